use customers_and_orders::{customers, orders, server};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().json().flatten_event(true).init();
    let pool = server::pool(&std::env::var("DATABASE_URL")?)?;
    let routes = match std::env::args().nth(1).as_deref() {
        Some("customers") => customers::routes(pool),
        Some("orders") => orders::routes(pool),
        _ => anyhow::bail!("usage: customers-and-orders customers|orders"),
    };
    server::serve(routes).await
}
