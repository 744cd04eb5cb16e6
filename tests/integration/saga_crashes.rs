//! Crashes of orchestrator, database and network while sagas run: every saga ends, with each effect exactly once.

use std::time::{Duration, Instant};

use serde_json::json;
use weft::contract::orchestrator::Orchestrator;

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, id},
    servers,
};

const SAGAS: usize = 60;

/// Starts `SAGAS` sagas, every tenth of which is refused by `charge`, without waiting for their ends.
async fn start_all(world: &World, orchestrator: &Running) -> Vec<(String, bool)> {
    let mut started = Vec::new();
    for number in 0..SAGAS {
        let refused = number % 10 == 0;
        let saga = if refused { "refused" } else { "order" };
        let input = json!({"orderId": format!("o-{number}"), "total": number});
        let (status, view) = orchestrator.start_saga(saga, &input, "", Some(&format!("k-{number}"))).await;
        assert_eq!(status, 201, "{view}");
        started.push((id(&view), refused));
    }
    assert_eq!(world.participant.effects("nobody"), Vec::<String>::new());
    started
}

async fn two_sagas(world: &World) -> Running {
    let mut refused = world.definition("refused");
    refused.steps[2].transaction_mut().unwrap().action.url = world.participant.url("charge-refused");
    world.participant.behave("charge-refused", Behaviour::Refuse("CreditLimitExceeded"));
    world.participant.behave("pack", Behaviour::Slow(Duration::from_millis(40)));
    world.run(world.contract(vec![world.definition("order"), refused.seal()], Vec::new())).await
}

fn check(world: &World, started: &[(String, bool)]) {
    for (id, refused) in started {
        let effects = world.participant.effects(id);
        if *refused {
            assert_eq!(effects, ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"], "{id}");
        } else {
            assert_eq!(effects, ["reserve do", "pack do", "charge do", "ship do"], "{id}");
        }
    }
}

async fn until_all_ended(orchestrator: &Running) {
    let (completed, compensated) = (SAGAS - SAGAS / 10, SAGAS / 10);
    orchestrator.until_counts("order", &[("completed", completed as u64), ("running", 0)]).await;
    orchestrator.until_counts("refused", &[("compensated", compensated as u64), ("running", 0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_orchestrator_continues_its_sagas() {
    let world = World::new().await;
    let mut orchestrator = two_sagas(&world).await;
    let started = start_all(&world, &orchestrator).await;
    for round in 1..=3 {
        servers::until("some calls are made", async || world.participant.count("pack") > round * SAGAS / 6).await;
        orchestrator.kill9();
        orchestrator.start();
        servers::until("it is ready", async || orchestrator.is_ready().await).await;
    }
    until_all_ended(&orchestrator).await;
    check(&world, &started);
}

#[tokio::test(flavor = "multi_thread")]
async fn sagas_continue_after_a_killed_database_is_back() {
    let mut world = World::new().await;
    let orchestrator = two_sagas(&world).await;
    let started = start_all(&world, &orchestrator).await;
    for round in 1..=3 {
        servers::until("some calls are made", async || world.participant.count("pack") > round * SAGAS / 6).await;
        world.database.server.kill9();
        servers::until("the problem is reported", async || {
            orchestrator.status().await["problems"].as_array().is_some_and(|problems| {
                problems.iter().any(|problem| problem["reason"].as_str().is_some_and(|r| r.starts_with("Database")))
            })
        })
        .await;
        world.database.server.restart();
    }
    until_all_ended(&orchestrator).await;
    check(&world, &started);
    servers::until("the problem is resolved", async || orchestrator.status().await.get("problems").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_orchestrator_neither_writes_nor_calls_after_it_was_taken_over_from() {
    let world = World::new().await;
    let first = two_sagas(&world).await;
    let started = start_all(&world, &first).await;
    servers::until("some calls are made", async || world.participant.count("pack") > SAGAS / 6).await;
    first.signal("-STOP");
    let mut contract = first.contract.clone();
    contract.api_port = servers::free_port();
    // it is ready when the lease of the stopped one has expired
    let second = world.run(contract).await;
    until_all_ended(&second).await;
    check(&world, &started);
    let client = world.database.superuser().await;
    let rows = "select count(*), coalesce(sum(hashtext(id::text || seq || body)), 0) from weft.saga_event";
    let before = client.query_one(rows, &[]).await.unwrap();
    // what it had sent before it was stopped has arrived long ago
    let calls = world.participant.all();
    first.signal("-CONT");
    servers::until("the first one has dropped its partitions", async || {
        !first.is_ready().await && first.status().await["sagas"]["order"]["running"] == 0
    })
    .await;
    let after = client.query_one(rows, &[]).await.unwrap();
    assert_eq!(before.get::<_, i64>(0), after.get::<_, i64>(0), "it has written nothing");
    assert_eq!(before.get::<_, i64>(1), after.get::<_, i64>(1));
    let (status, problem) = first.start_saga("order", &json!({"orderId": "late", "total": 1}), "", None).await;
    assert_eq!(status, 503, "{problem}");
    check(&world, &started);
    assert_eq!(world.participant.all(), calls, "calls of a process that was taken over from");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_database_is_reported_within_five_seconds() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let beginning = format!("PostgreSQL at 127.0.0.1:{} has not answered since ", world.database.server.port());
    let stopped = Instant::now();
    world.database.server.signal("-STOP");
    servers::until(&beginning, async || {
        let status = orchestrator.status().await;
        let mut problems = status["problems"].as_array().into_iter().flatten();
        problems.any(|problem| problem["message"].as_str().is_some_and(|message| message.starts_with(&beginning)))
    })
    .await;
    assert!(stopped.elapsed() < Duration::from_secs(5), "reported after {:?}", stopped.elapsed());
    world.database.server.signal("-CONT");
    servers::until("the problem is resolved", async || orchestrator.status().await.get("problems").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_takes_long_is_no_outage() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let client = world.database.superuser().await;
    client.batch_execute("begin; lock weft.saga_event in access exclusive mode").await.unwrap();
    let input = json!({"orderId": "o-1", "total": 1});
    let (started, ()) = tokio::join!(orchestrator.start_saga("order", &input, "?wait=30s", None), async {
        let waits = "select exists (select from pg_stat_activity \
             where wait_event_type = 'Lock' and application_name = 'weft saga writer')";
        crate::database::until(&client, waits).await;
        let began = Instant::now();
        servers::until("the lock was held for 5 s", async || {
            let status = orchestrator.status().await;
            assert!(status["sagas"].is_object() && status.get("problems").is_none(), "{status}");
            began.elapsed() > Duration::from_secs(5)
        })
        .await;
        client.batch_execute("rollback").await.unwrap();
    });
    assert_eq!((started.0, &started.1["state"]), (201, &json!("Completed")), "{started:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_that_shuts_down_hands_over_at_once() {
    let world = World::new().await;
    let mut first = two_sagas(&world).await;
    let started = start_all(&world, &first).await;
    let mut contract = first.contract.clone();
    contract.api_port = servers::free_port();
    let second = world.spawn(contract);
    servers::until("the second one is a standby", async || {
        second.status().await["problems"][0]["reason"] == "Standby" && !second.is_ready().await
    })
    .await;
    first.terminate().await;
    second.until_ready().await;
    until_all_ended(&second).await;
    check(&world, &started);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_writer_s_session_may_be_cut_at_any_time() {
    let world = World::new().await;
    let orchestrator = two_sagas(&world).await;
    let client = world.database.superuser().await;
    let cut =
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'weft saga writer'";
    let (started, ()) = tokio::join!(start_all_patiently(&orchestrator), async {
        for _ in 0..10 {
            client.query_one(cut, &[]).await.unwrap();
            let holds = "select count(*) = 16 from pg_locks where locktype = 'advisory' and classid = 5701";
            crate::database::until(&client, holds).await;
        }
    });
    until_all_ended(&orchestrator).await;
    check(&world, &started);
}

/// As a client does that gets 503 now and then: the key makes a repetition safe.
async fn start_all_patiently(orchestrator: &Running) -> Vec<(String, bool)> {
    let mut started = Vec::new();
    for number in 0..SAGAS {
        let refused = number % 10 == 0;
        let saga = if refused { "refused" } else { "order" };
        let input = json!({"orderId": format!("o-{number}"), "total": number});
        let key = format!("k-{number}");
        servers::until("the start is taken", async || {
            let (status, view) = orchestrator.start_saga(saga, &input, "", Some(&key)).await;
            if status < 300 {
                started.push((id(&view), refused));
            }
            status < 300
        })
        .await;
    }
    started
}

/// A key is sent again after its saga has ended, while the database commits nothing for longer than the deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_start_while_the_database_stalls_blocks_nothing() {
    let world = World::new().await;
    let mut hasty = world.definition("hasty");
    hasty.deadline_ms = 3_000;
    let mut patient = world.definition("patient");
    patient.deadline_ms = 6_000;
    patient.steps[0].transaction_mut().unwrap().timeout_ms = 60_000;
    patient.steps[0].transaction_mut().unwrap().action.url = world.participant.url("reserve-slowly");
    world.participant.behave("reserve-slowly", Behaviour::Slow(Duration::from_secs(30)));
    let orchestrator = world.run(world.contract(vec![hasty.seal(), patient.seal()], Vec::new())).await;
    let input = json!({"orderId": "o-1", "total": 1});
    let (_, first) = orchestrator.start_saga("hasty", &input, "?wait=true", Some("k-1")).await;
    assert_eq!(first["state"], "Completed", "{first}");

    let (status, _) = orchestrator.start_saga("patient", &input, "", None).await;
    assert_eq!(status, 201);
    let client = world.database.superuser().await;
    client.batch_execute("begin; lock weft.saga_instance in access exclusive mode").await.unwrap();
    // the commit of this start is in progress when the key is sent again: the repeated start and what follows it share
    // the next commit
    let (other, again, ()) = tokio::join!(
        orchestrator.start_saga("hasty", &input, "", None),
        orchestrator.start_saga("hasty", &input, "?wait=true", Some("k-1")),
        async {
            servers::until("the repeated start waits", async || {
                let listed = orchestrator.get("/sagas/hasty?state=running").await.1;
                listed["items"].as_array().is_some_and(|items| items.iter().any(|item| item["id"] == first["id"]))
            })
            .await;
            let (status, problem) = orchestrator.verb("hasty", &id(&first), "cancel").await;
            assert_eq!((status, &problem["title"]), (503, &json!("NotHeld")), "{problem}");
            servers::until("a later deadline has passed", async || {
                orchestrator.get("/sagas/patient?state=compensating").await.1["items"][0].is_object()
            })
            .await;
            client.batch_execute("rollback").await.unwrap();
        }
    );
    assert_eq!(other.0, 201, "{other:?}");
    assert_eq!((again.0, &again.1["id"], &again.1["state"]), (200, &first["id"], &json!("Completed")));
    continues(&world, &orchestrator, &id(&first)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_start_while_the_database_is_down_blocks_nothing() {
    let mut world = World::new().await;
    let mut hasty = world.definition("hasty");
    hasty.deadline_ms = 3_000;
    let orchestrator = world.run(world.contract(vec![hasty.seal()], Vec::new())).await;
    let input = json!({"orderId": "o-1", "total": 1});
    let (_, first) = orchestrator.start_saga("hasty", &input, "?wait=true", Some("k-1")).await;
    world.database.server.kill9();
    let (again, ()) = tokio::join!(orchestrator.start_saga("hasty", &input, "", Some("k-1")), async {
        servers::until("the problem is reported", async || orchestrator.status().await["problems"][0].is_object())
            .await;
        // longer than the deadline, and than the time by which it is postponed
        tokio::time::sleep(Duration::from_secs(4)).await;
        world.database.server.restart();
    });
    assert_eq!((again.0, &again.1["id"], &again.1["state"]), (200, &first["id"], &json!("Completed")));
    continues(&world, &orchestrator, &id(&first)).await;
}

/// The first instance of a repeated start is unchanged, and new sagas run.
async fn continues(world: &World, orchestrator: &Running, first: &str) {
    let view = orchestrator.to_its_end("hasty", &json!({"orderId": "o-2", "total": 1})).await;
    assert_eq!(view["state"], "Completed", "{view}");
    assert_eq!(world.participant.effects(first), ["reserve do", "pack do", "charge do", "ship do"]);
    let detail = orchestrator.get(&format!("/sagas/hasty/{first}")).await.1;
    assert_eq!(detail["history"].as_array().unwrap().len(), 5, "{detail}");
    servers::until("nothing is wrong", async || orchestrator.status().await.get("problems").is_none()).await;
}

/// Such logs exist after a roll-back of the orchestrator's version, or after manual changes.
#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_instance_blocks_no_other_one() {
    let world = World::new().await;
    let mut orchestrator =
        world.orchestrator_of(|order| order.steps[1].transaction_mut().unwrap().timeout_ms = 60_000).await;
    world.participant.behave("pack", Behaviour::Slow(Duration::from_secs(30)));
    let mut started = Vec::new();
    for number in 0..20 {
        let input = json!({"orderId": format!("o-{number}"), "total": number});
        let (_, view) = orchestrator.start_saga("order", &input, "", Some(&format!("k-{number}"))).await;
        started.push(id(&view));
    }
    servers::until("they are running", async || world.participant.count("pack") == 20).await;
    orchestrator.kill9();
    let client = world.database.superuser().await;
    let (newer, headless, holed, undefined) = (&started[0], &started[1], &started[2], &started[3]);
    let other_rules = &started[4];
    let script = format!(
        "insert into weft.saga_event (bucket, id, seq, at, body) values (1, '{newer}', 2, now(), '{{\"forked\": 7}}');
         delete from weft.saga_event where id = '{headless}' and seq = 0;
         update weft.saga_event set seq = 3 where id = '{holed}' and seq = 1;
         update weft.saga_instance set version = 'lost' where id = '{undefined}';
         update weft.saga_event set body = replace(body, '\"to\":{{\"at\":[{{\"do\":2}}', '\"to\":{{\"at\":[{{\"do\":3}}')
         where id = '{other_rules}' and seq = 1;"
    );
    client.batch_execute(&script).await.unwrap();
    world.participant.behave("pack", Behaviour::Succeed);
    orchestrator.start();
    orchestrator.until_ready().await;
    orchestrator.until_counts("order", &[("completed", 15), ("running", 0)]).await;
    let view = orchestrator.to_its_end("order", &json!({"orderId": "new", "total": 1})).await;
    assert_eq!(view["state"], "Completed", "{view}");
    let problems = orchestrator.status().await["problems"].clone();
    let messages = problems.to_string();
    assert!(started[..5].iter().all(|id| messages.contains(id)), "{messages}");
    assert!(messages.contains(&format!("{other_rules}: this version decides otherwise")), "{messages}");
    assert!(started[5..].iter().all(|id| !messages.contains(id)), "{messages}");
    assert!(problems.as_array().unwrap().iter().all(|problem| problem["reason"] == "InstanceUnreadable"), "{messages}");

    // it exists all the same: its key starts nothing, and requests for it get an error
    let input = json!({"orderId": "o-0", "total": 0});
    let (status, problem) = orchestrator.start_saga("order", &input, "", Some("k-0")).await;
    assert_eq!((status, &problem["title"]), (500, &json!("Unreadable")), "{problem}");
    let (status, problem) = orchestrator.verb("order", newer, "retry").await;
    assert_eq!(
        (status, &problem["detail"]),
        (500, &json!(format!("the log of instance {newer} cannot be read at row 2")))
    );
    assert_eq!(world.participant.effects(newer), ["reserve do", "pack do"]);

    // a version that can read it continues it
    client.execute("delete from weft.saga_event where body like '%forked%'", &[]).await.unwrap();
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_state("order", newer, "Completed").await;
}

/// A list that is slow, here because it waits for a lock.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_list_is_given_up_and_blocks_nothing_else() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let client = world.database.superuser().await;
    client
        .batch_execute("begin; lock weft.saga_count, weft.saga_bucket, weft.saga_instance in access exclusive mode")
        .await
        .unwrap();
    let (status, problem) = orchestrator.get("/sagas/order?state=completed").await;
    assert_eq!((status, &problem["title"]), (503, &json!("DatabaseUnreachable")), "{problem}");
    client.batch_execute("rollback").await.unwrap();
    let (status, list) = orchestrator.get("/sagas/order?state=completed").await;
    assert_eq!((status, &list["items"]), (200, &json!([])), "{list}");
    let queries = "select count(*) from pg_stat_activity where application_name = 'weft saga api' and state <> 'idle'";
    servers::until("the server has given up, too", async || {
        client.query_one(queries, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A dump, or a transaction that somebody forgot, keeps the tables from being changed.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_starts_before_there_is_a_bucket_and_no_bucket_is_needed_for_what_runs() {
    let world = World::new().await;
    let client = world.database.superuser().await;
    let hold = "begin; lock weft.saga_instance, weft.saga_event in access share mode";
    client.batch_execute(hold).await.unwrap();
    let contract = Orchestrator { retention_ms: 1_000, ..world.contract(vec![world.definition("order")], Vec::new()) };
    let mut orchestrator = world.spawn(contract);
    servers::until("it says why it is not ready", async || {
        orchestrator.status().await["problems"].to_string().contains("in use by a long query or transaction")
    })
    .await;
    client.batch_execute("rollback").await.unwrap();
    orchestrator.until_ready().await;
    let input = json!({"orderId": "o-1", "total": 1});
    assert_eq!(orchestrator.to_its_end("order", &input).await["state"], "Completed");
    // with a bucket everything goes on, though another is due
    client.batch_execute(hold).await.unwrap();
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(orchestrator.to_its_end("order", &input).await["state"], "Completed");
    let buckets = "select count(*) from weft.saga_bucket";
    assert_eq!(client.query_one(buckets, &[]).await.unwrap().get::<_, i64>(0), 1);
    client.batch_execute("rollback").await.unwrap();
    servers::until("another bucket is opened", async || {
        client.query_one(buckets, &[]).await.unwrap().get::<_, i64>(0) > 1
    })
    .await;
    assert_eq!(orchestrator.to_its_end("order", &input).await["state"], "Completed");
}
