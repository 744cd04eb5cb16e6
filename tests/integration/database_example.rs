//! The example services, against databases as `weft database setup` makes them of the examples' own migrations.

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, StatusCode},
};
use customers_and_orders::{customers, orders, server};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tower::ServiceExt;

use crate::database::{APP_PASSWORD, DATABASE, Database};

/// One of the two services with its database.
pub struct Service {
    routes: Router,
    pub database: Database,
}

impl Service {
    async fn start(name: &str, routes: fn(deadpool_postgres::Pool) -> Router) -> Self {
        let mut database = Database::empty().await;
        let migrations = format!("{}/examples/customers-and-orders/migrations/{name}", env!("CARGO_MANIFEST_DIR"));
        database.setup.migrations = Some(migrations.into());
        database.write_contract();
        database.set_up_well();
        let url = database.server.url("app", &APP_PASSWORD.replace(' ', "%20"), DATABASE);
        Self { routes: routes(server::pool(&url).unwrap()), database }
    }

    pub async fn orders() -> Self {
        Self::start("orders", orders::routes).await
    }

    pub async fn customers() -> Self {
        Self::start("customers", customers::routes).await
    }

    /// Serves the routes on a port of its own; gives the port.
    pub async fn listen(&self) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let routes = self.routes.clone();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        port
    }

    async fn request(&self, request: Request<Body>) -> (StatusCode, Value) {
        let response = self.routes.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub async fn ask(&self, path: &str) -> (StatusCode, Value) {
        self.request(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: Value) -> (StatusCode, Value) {
        let mut request = Request::post(path).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.request(request.body(Body::from(body.to_string())).unwrap()).await
    }

    async fn command(&self, path: &str, key: &str, body: Value) -> (StatusCode, Value) {
        self.post(path, &[("idempotency-key", key), ("traceparent", "00-a-b-01")], body).await
    }

    /// `TYPE AGGREGATE` of the outbox's rows in order.
    async fn events(&self) -> Vec<String> {
        let sql = "select type || ' ' || aggregate_type from weft.outbox order by seq";
        texts(&self.database.superuser().await, sql).await
    }
}

async fn texts(client: &Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn an_order_is_placed_with_its_event_and_once_per_key() {
    let orders = Service::orders().await;
    let body = json!({"customerId": "c1", "total": 4200});
    let (status, placed) = orders.post("/orders", &[], body.clone()).await;
    assert_eq!((status, &placed["state"]), (StatusCode::CREATED, &json!("PENDING")));
    let id = placed["id"].as_str().unwrap();
    let (_, first) = orders.post("/orders", &[("idempotency-key", "k")], body.clone()).await;
    let (_, again) = orders.post("/orders", &[("idempotency-key", "k")], body).await;
    assert_eq!(first, again);
    assert_eq!(orders.events().await, ["OrderCreated order"; 2]);
    let client = orders.database.superuser().await;
    let row = client.query_one("select payload from weft.outbox where aggregate_id = $1", &[&id]).await.unwrap();
    assert_eq!(row.get::<_, Value>(0), json!({"orderId": id, "customerId": "c1", "total": 4200}));

    let shown = orders.get(&format!("/orders/{id}")).await;
    let expected =
        json!({"id": id, "customerId": "c1", "total": 4200, "article": null, "state": "PENDING", "reason": null});
    assert_eq!(shown, expected);
    assert_eq!(orders.get("/orders").await.as_array().unwrap().len(), 2);
    let (status, _) = orders.post("/orders", &[], json!({"customerId": "c1", "total": 0})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn an_order_is_approved_or_rejected_once() {
    let orders = Service::orders().await;
    let place = async || {
        let (_, placed) = orders.post("/orders", &[], json!({"customerId": "c1", "total": 1})).await;
        placed["id"].as_str().unwrap().to_owned()
    };
    let (good, bad) = (place().await, place().await);
    for _ in 0..2 {
        let answer = orders.command("/commands/approve-order", "s1/approve/do", json!({"orderId": good})).await;
        assert_eq!(answer, (StatusCode::OK, json!({"id": good, "state": "APPROVED"})));
        let body = json!({"orderId": bad, "reason": "INSUFFICIENT_CREDIT"});
        let answer = orders.command("/commands/reject-order", "s2/onCompensated/do", body).await;
        assert_eq!(answer, (StatusCode::OK, json!({"id": bad, "state": "REJECTED"})));
    }
    assert_eq!(orders.get(&format!("/orders/{bad}")).await["reason"], "INSUFFICIENT_CREDIT");
    let events = ["OrderCreated order", "OrderCreated order", "OrderApproved order", "OrderRejected order"];
    assert_eq!(orders.events().await, events);
    let client = orders.database.superuser().await;
    let correlated = texts(&client, "select context::text from weft.outbox where type = 'OrderApproved'").await;
    let context = json!({"correlationid": "s1", "causationid": "s1/approve/do", "traceparent": "00-a-b-01"});
    assert_eq!(correlated.iter().map(|text| serde_json::from_str(text).unwrap()).collect::<Vec<Value>>(), [context]);

    let answer = orders.command("/commands/approve-order", "s3/approve/do", json!({"orderId": bad})).await;
    assert_eq!((answer.0, &answer.1["type"]), (StatusCode::CONFLICT, &json!("OrderNotPending")));
    let answer = orders.command("/commands/approve-order", "no key", json!({"orderId": bad})).await;
    assert_eq!((answer.0, &answer.1["type"]), (StatusCode::BAD_REQUEST, &json!("BadIdempotencyKey")));
}

async fn customer(customers: &Service, credit_limit: i64) -> String {
    let (status, added) = customers.post("/customers", &[], json!({"name": "Ann", "creditLimit": credit_limit})).await;
    assert_eq!(status, StatusCode::CREATED);
    added["id"].as_str().unwrap().to_owned()
}

fn credit(customer: &str, order: &str, amount: i64) -> Value {
    json!({"customerId": customer, "orderId": order, "amount": amount})
}

#[tokio::test]
async fn credit_is_reserved_and_released_once() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    let reserved = async || customers.get(&format!("/customers/{ann}")).await["reserved"].as_i64().unwrap();
    for _ in 0..2 {
        let answer = customers.command("/commands/reserve-credit", "s1/reserve/do", credit(&ann, "o1", 700)).await;
        assert_eq!(answer, (StatusCode::OK, json!({"available": 300})));
    }
    assert_eq!(reserved().await, 700);
    for _ in 0..2 {
        let answer = customers.command("/commands/release-credit", "s1/reserve/undo", credit(&ann, "o1", 700)).await;
        assert_eq!(answer, (StatusCode::OK, json!({"released": 700})));
    }
    assert_eq!(reserved().await, 0);
    assert_eq!(customers.events().await, ["CreditReserved customer", "CreditReleased customer"]);
}

#[tokio::test]
async fn a_refused_reservation_stays_refused_and_is_nothing_to_undo() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    customers.command("/commands/reserve-credit", "s1/reserve/do", credit(&ann, "o1", 700)).await;
    let too_much =
        async || customers.command("/commands/reserve-credit", "s2/reserve/do", credit(&ann, "o2", 700)).await;
    let (status, problem) = too_much().await;
    assert_eq!((status, &problem["type"]), (StatusCode::CONFLICT, &json!("CreditLimitExceeded")));
    // there is credit now, yet a late repetition may not take any: its saga has gone on without it
    customers.command("/commands/release-credit", "s1/reserve/undo", credit(&ann, "o1", 700)).await;
    assert_eq!(too_much().await, (status, problem));
    let answer = customers.command("/commands/release-credit", "s2/reserve/undo", credit(&ann, "o2", 700)).await;
    assert_eq!(answer, (StatusCode::OK, json!({"undone": "nothing, since it was never done"})));

    let (status, problem) =
        customers.command("/commands/reserve-credit", "s3/reserve/do", credit("nobody", "o3", 1)).await;
    assert_eq!((status, &problem["type"]), (StatusCode::CONFLICT, &json!("CustomerNotFound")));
}

#[tokio::test]
async fn the_undo_of_a_refused_reservation_leaves_that_of_another_saga() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    let (status, _) = customers.command("/commands/reserve-credit", "s1/reserve/do", credit(&ann, "o1", 700)).await;
    assert_eq!(status, StatusCode::OK);
    let (_, problem) = customers.command("/commands/reserve-credit", "s2/reserve/do", credit(&ann, "o1", 200)).await;
    assert_eq!(problem["type"], "AlreadyReserved");
    // the answer was lost, so s2 undoes what it may have done
    let (status, _) = customers.command("/commands/release-credit", "s2/reserve/undo", credit(&ann, "o1", 200)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(customers.get(&format!("/customers/{ann}")).await["reserved"], 700);
}

#[tokio::test]
async fn an_undo_that_comes_first_keeps_its_do_out() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    let (status, _) = customers.command("/commands/release-credit", "s1/reserve/undo", credit(&ann, "o1", 700)).await;
    assert_eq!(status, StatusCode::OK);
    let (status, problem) =
        customers.command("/commands/reserve-credit", "s1/reserve/do", credit(&ann, "o1", 700)).await;
    assert_eq!((status, &problem["type"]), (StatusCode::CONFLICT, &json!("AlreadyUndone")));
    assert!(customers.events().await.is_empty());
}

#[tokio::test]
async fn credit_is_not_reserved_twice_by_reservations_at_the_same_time() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    let (customers, ann) = (&customers, &ann);
    let reserve = |n: usize| async move {
        let (key, order) = (format!("s{n}/reserve/do"), format!("o{n}"));
        customers.command("/commands/reserve-credit", &key, credit(ann, &order, 300)).await.0
    };
    let answers = futures::future::join_all((0..8).map(reserve)).await;
    assert_eq!(answers.iter().filter(|&&status| status == StatusCode::OK).count(), 3);
    assert_eq!(customers.get(&format!("/customers/{ann}")).await["reserved"], 900);
}

#[tokio::test]
async fn an_event_counts_once() {
    let customers = Service::customers().await;
    let ann = customer(&customers, 1_000).await;
    let event = async |id: &str, kind: &str| {
        let headers = [("ce-specversion", "1.0"), ("ce-id", id), ("ce-source", "/shop/orders"), ("ce-type", kind)];
        customers.post("/events", &headers, json!({"customerId": ann})).await.0
    };
    for (id, kind) in [("1", "OrderApproved"), ("1", "OrderApproved"), ("2", "OrderApproved"), ("3", "OrderCreated")] {
        assert_eq!(event(id, kind).await, StatusCode::NO_CONTENT);
    }
    assert_eq!(customers.get(&format!("/customers/{ann}")).await["approvedOrders"], 2);
    let (status, _) = customers.post("/events", &[("ce-id", "9")], json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "an event without source and type is none");
}

#[tokio::test]
async fn a_service_says_when_its_database_is_gone() {
    let mut orders = Service::orders().await;
    let healthz = || Request::get("/healthz").body(Body::empty()).unwrap();
    assert_eq!(orders.request(healthz()).await.0, StatusCode::OK);
    orders.database.server.kill9();
    let (status, _) = orders.request(healthz()).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    let (status, problem) = orders.post("/orders", &[], json!({"customerId": "c1", "total": 1})).await;
    assert_eq!((status, &problem["type"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("Unavailable")));
    orders.database.server.restart();
    assert_eq!(orders.request(healthz()).await.0, StatusCode::OK);
}
