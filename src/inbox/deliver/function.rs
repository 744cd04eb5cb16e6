//! A function of the service's database: one statement, and so one transaction, receives the event and calls the function with it.
//!
//! The function executes as the role that the service itself has. An error with the SQLSTATE [`REFUSED`] refuses the event for
//! good: `raise exception 'no such customer' using errcode = 'WEFTR'`.

use std::time::Duration;

use postgres_protocol::escape::escape_identifier;
use tokio::{sync::Mutex, time::timeout};
use tokio_postgres::{Client, Statement, types::Type};

use super::Outcome;
use crate::{
    contract::{DatabaseLogin, inbox::FunctionTarget},
    inbox::event::Event,
    outage::Failure,
    postgres::{self, login},
};

/// Transactions on the way at a time, each in a session of its own.
pub(super) const CONCURRENT: usize = 8;
/// SQLSTATE by which a function refuses an event for good.
pub(in crate::inbox) const REFUSED: &str = "WEFTR";
/// How long a function may take.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(in crate::inbox) struct Function {
    /// What `weft.receive` is given as the consumer.
    consumer: String,
    sql: String,
    database: DatabaseLogin,
    sessions: [Mutex<Option<Session>>; CONCURRENT],
}

#[derive(Debug)]
struct Session {
    client: Client,
    statement: Statement,
}

impl Function {
    pub(super) fn new(consumer: &str, function: &FunctionTarget, database: &DatabaseLogin) -> Self {
        let FunctionTarget { schema, name } = function;
        let name = escape_identifier(name);
        let function = match schema {
            Some(schema) => format!("{}.{name}", escape_identifier(schema)),
            None => name,
        };
        let weft = escape_identifier(login::schema(database));
        Self {
            consumer: consumer.to_owned(),
            // the event is received before the function is called: `materialized` is evaluated first, and once
            sql: format!(
                "with received as materialized (select {weft}.receive($1, $2, $3, $4, $5) as new)
                 select {function}($6::text::jsonb) from received where new"
            ),
            database: database.clone(),
            sessions: Default::default(),
        }
    }

    pub(super) async fn deliver(&self, event: &Event) -> Outcome {
        // at most as many deliveries as sessions are on the way, so one is free; the first is, so that no more are opened than needed
        let Some(mut session) = self.sessions.iter().find_map(|session| session.try_lock().ok()) else {
            return Outcome::Failed("no session of the database is free".to_owned());
        };
        match timeout(DEADLINE, self.call(&mut session, event)).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => {
                // the server ends the statement when its client is gone
                *session = None;
                Outcome::Failed(format!("the function did not end within {} s", DEADLINE.as_secs()))
            }
        }
    }

    async fn call(&self, session: &mut Option<Session>, event: &Event) -> Outcome {
        let Session { client, statement } = match session {
            Some(session) => session,
            None => match self.connect().await {
                Ok(connected) => session.insert(connected),
                Err(why) => return Outcome::Failed(why),
            },
        };
        let (source, id) = (event.source(), event.id());
        let (correlation, trace) = (event.get("correlationid"), event.get("traceparent"));
        let json = event.to_json();
        let called = client.execute(statement, &[&self.consumer, &source, &id, &correlation, &trace, &json]).await;
        match called {
            Ok(_) => Outcome::Handled,
            Err(error) => {
                let why = match postgres::failure(&error) {
                    Failure::Refused(cause) | Failure::Disconnected(cause) => cause,
                    Failure::Silent => "PostgreSQL does not answer".to_owned(),
                };
                let code = error.code().map(|code| code.code().to_owned());
                if code.as_deref() == Some(REFUSED) {
                    return Outcome::Refused(error.as_db_error().map_or(why, |error| error.message().to_owned()));
                }
                // a function that was replaced, or a connection that is lost
                *session = None;
                Outcome::Failed(why)
            }
        }
    }

    async fn connect(&self) -> Result<Session, String> {
        let connected = login::connect(&self.database, &format!("weft inbox {}", self.consumer)).await;
        let (client, connection) = connected.map_err(|error| crate::outage::with_causes(&error))?;
        // ends with the client; a failure shows in the client's next call
        tokio::spawn(connection);
        let types = [Type::TEXT; 6];
        let prepared = client.prepare_typed(&self.sql, &types).await;
        let statement = prepared.map_err(|error| match postgres::failure(&error) {
            Failure::Refused(cause) | Failure::Disconnected(cause) => cause,
            Failure::Silent => "PostgreSQL does not answer".to_owned(),
        })?;
        Ok(Session { client, statement })
    }
}
