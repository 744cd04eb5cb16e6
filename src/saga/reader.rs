//! Reads from the orchestrator's database, and stores definitions in it. None of this is on the hot path.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio_postgres::{Client, types::ToSql};
use uuid::Uuid;

use super::{
    filter::{Cursor, Filter},
    problem::SagaProblem,
    view::Logged,
};
use crate::{
    contract::{DatabaseLogin, orchestrator::Start},
    domain::saga::{definition::Definition, state::Status},
    outage::Failure,
    postgres::{
        self,
        login::{self, LoginError},
    },
};

/// Deadline of a query; recovery may read much.
const DEADLINE: Duration = Duration::from_mins(1);
/// Deadline of a query for a request to the API.
const API_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("reading the saga log")]
    Database(#[from] tokio_postgres::Error),
    #[error("the database did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the log of instance {id} cannot be read at row {seq}")]
    Event {
        id: Uuid,
        seq: i32,
        #[source]
        source: serde_json::Error,
    },
    #[error("definition {version} of saga {saga} cannot be read")]
    Definition {
        saga: String,
        version: String,
        #[source]
        source: serde_json::Error,
    },
}

impl ReadError {
    fn failure(&self) -> Failure {
        match self {
            Self::Login(error) => error.failure(),
            Self::Database(error) => postgres::failure(error),
            Self::Timeout(_) => Failure::Silent,
            Self::Event { .. } | Self::Definition { .. } => Failure::Refused(self.to_string()),
        }
    }

    /// True when retrying cannot help, because the stored content is damaged or of a newer version; false when the
    /// database failed and may recover.
    pub(super) fn is_permanent(&self) -> bool {
        matches!(self, Self::Event { .. } | Self::Definition { .. })
    }
}

/// An instance's log, or why it cannot be read.
pub(super) type Log = Result<Vec<Logged>, ReadError>;

/// A row of `weft.saga_instance`.
#[derive(Debug)]
pub(super) struct Listed {
    pub id: Uuid,
    pub bucket: i32,
    pub saga: String,
    pub version: String,
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    /// `None`: live.
    pub state: Option<Status>,
    /// The business key.
    pub key: Option<String>,
}

/// A row of `weft.saga_start`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// As the server gives it.
    pub stream_created: String,
    /// The first sequence of the stream that is not known to be handled.
    pub next: u64,
}

/// A row of `weft.saga_dead_start`.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeadStart<'a> {
    pub stream: &'a str,
    pub sequence: u64,
    pub subject: &'a str,
    /// The event's id.
    pub event: Option<&'a str>,
    pub why: &'a str,
}

const COLUMNS: &str = "id, saga, version, started_at, ended_at, state, bucket, key";

/// One shared connection, re-established when it is lost. Its queries come one after another, so what people list has a
/// connection of its own: it may be slow, and nothing else waits for it.
#[derive(Debug)]
pub(super) struct Reader {
    login: DatabaseLogin,
    application: &'static str,
    deadline: Duration,
    client: Mutex<Option<Arc<Client>>>,
}

impl Reader {
    pub(super) fn new(login: DatabaseLogin) -> Self {
        Self { login, application: "weft saga reader", deadline: DEADLINE, client: Mutex::new(None) }
    }

    pub(super) fn for_api(login: DatabaseLogin) -> Self {
        Self { login, application: "weft saga api", deadline: API_DEADLINE, client: Mutex::new(None) }
    }

    async fn client(&self) -> Result<Arc<Client>, ReadError> {
        let mut client = self.client.lock().await;
        if let Some(client) = client.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let (fresh, connection) = login::connect(&self.login, self.application).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the reader's connection ended");
            }
        });
        // the server gives up, too, and does not go on with what nobody waits for
        fresh.batch_execute(&format!("set statement_timeout = {}", self.deadline.as_millis())).await?;
        let fresh = Arc::new(fresh);
        *client = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, ReadError> {
        let client = self.client().await?;
        match tokio::time::timeout(self.deadline, client.query(sql, parameters)).await {
            Ok(rows) => Ok(rows?),
            Err(_elapsed) => {
                *self.client.lock().await = None;
                Err(ReadError::Timeout(self.deadline))
            }
        }
    }

    /// The problem to report for `error`; `refused` makes it when the database answered with an error.
    pub(super) fn problem(
        &self,
        error: &ReadError,
        refused: impl FnOnce(String, String) -> SagaProblem,
    ) -> SagaProblem {
        let address = login::address(&self.login);
        let waited = if let ReadError::Timeout(waited) = error { *waited } else { Duration::ZERO };
        SagaProblem::of_database(&address, error.failure(), waited, refused)
    }

    /// Stores a definition. Its version is a hash of its content, so a stored definition with the same version is the
    /// same one.
    pub(super) async fn store(&self, definition: &Definition) -> Result<(), ReadError> {
        const SQL: &str =
            "insert into weft.saga_definition (saga, version, body) values ($1, $2, $3) on conflict do nothing";
        let (saga, version) = (&definition.name, &definition.version);
        let unreadable = |source| ReadError::Definition { saga: saga.clone(), version: version.clone(), source };
        let body = serde_json::to_string(definition).map_err(unreadable)?;
        self.query(SQL, &[saga, version, &body]).await?;
        Ok(())
    }

    pub(super) async fn definition(&self, saga: &str, version: &str) -> Result<Option<Definition>, ReadError> {
        const SQL: &str = "select body from weft.saga_definition where saga = $1 and version = $2";
        let rows = self.query(SQL, &[&saga, &version]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let body: &str = row.try_get(0)?;
        let unreadable = |source| ReadError::Definition { saga: saga.to_owned(), version: version.to_owned(), source };
        serde_json::from_str(body).map(Some).map_err(unreadable)
    }

    /// Identifies this database.
    pub(super) async fn store_id(&self) -> Result<Uuid, ReadError> {
        let rows = self.query("select id from weft.saga_store", &[]).await?;
        Ok(rows.first().map(|row| row.try_get(0)).transpose()?.unwrap_or_default())
    }

    pub(super) async fn position(&self, start: &Start, stream: &str) -> Result<Option<Position>, ReadError> {
        const SQL: &str = "select stream_created, next from weft.saga_start
             where saga = $1 and service = $2 and event_type = $3 and stream = $4";
        let rows = self.query(SQL, &[&start.saga, &start.service, &start.event_type, &stream]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let next = u64::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0);
        Ok(Some(Position { stream_created: row.try_get(0)?, next }))
    }

    /// A position never goes back, but in a stream that was made again.
    pub(super) async fn record_position(
        &self,
        start: &Start,
        stream: &str,
        position: &Position,
    ) -> Result<(), ReadError> {
        const SQL: &str =
            "insert into weft.saga_start as known (saga, service, event_type, stream, stream_created, next)
             values ($1, $2, $3, $4, $5, $6)
             on conflict (saga, service, event_type, stream)
             do update set stream_created = excluded.stream_created, next = excluded.next
             where known.stream_created <> excluded.stream_created or known.next < excluded.next";
        let next = i64::try_from(position.next).unwrap_or(i64::MAX);
        let Start { saga, service, event_type, .. } = start;
        self.query(SQL, &[saga, service, event_type, &stream, &position.stream_created, &next]).await?;
        Ok(())
    }

    /// Records an event that can never start the saga, and drops what is older than a month; returns how many there are.
    pub(super) async fn bury(&self, saga: &str, dead: &DeadStart<'_>) -> Result<u64, ReadError> {
        const SQL: &str = "with old as (
               delete from weft.saga_dead_start where saga = $1 and at < clock_timestamp() - interval '30 days')
             insert into weft.saga_dead_start (saga, stream, sequence, subject, event_id, reason)
             values ($1, $2, $3, $4, $5, $6) on conflict do nothing";
        let sequence = i64::try_from(dead.sequence).unwrap_or(i64::MAX);
        self.query(SQL, &[&saga, &dead.stream, &sequence, &dead.subject, &dead.event, &dead.why]).await?;
        self.dead_starts(saga).await
    }

    /// How many events of the last month could not start the saga.
    pub(super) async fn dead_starts(&self, saga: &str) -> Result<u64, ReadError> {
        const SQL: &str = "select count(*) from weft.saga_dead_start
             where saga = $1 and at >= clock_timestamp() - interval '30 days'";
        let rows = self.query(SQL, &[&saga]).await?;
        let count: i64 = rows.first().map(|row| row.try_get(0)).transpose()?.unwrap_or(0);
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// How many instances of each saga have ended: saga, completed, compensated.
    pub(super) async fn counts(&self) -> Result<Vec<(String, u64, u64)>, ReadError> {
        let rows = self.query("select saga, completed, compensated from weft.saga_count", &[]).await?;
        let count = |row: &tokio_postgres::Row, index: usize| -> Result<u64, ReadError> {
            Ok(u64::try_from(row.try_get::<_, i64>(index)?).unwrap_or(0))
        };
        rows.iter().map(|row| Ok((row.try_get(0)?, count(row, 1)?, count(row, 2)?))).collect()
    }

    pub(super) async fn instance(&self, saga: &str, id: Uuid) -> Result<Option<Listed>, ReadError> {
        let sql = format!("select {COLUMNS} from weft.saga_instance where id = $1 and saga = $2");
        let rows = self.query(&sql, &[&id, &saga]).await?;
        rows.first().map(listed).transpose()
    }

    /// Live instances of a partition.
    pub(super) async fn live(&self, partition: i16) -> Result<Vec<Listed>, ReadError> {
        let sql = format!("select {COLUMNS} from weft.saga_instance where partition = $1 and state is null");
        self.query(&sql, &[&partition]).await?.iter().map(listed).collect()
    }

    /// Instances of a saga, the latest first, after `after`; with a status, only those that ended in it.
    pub(super) async fn list(
        &self,
        saga: &str,
        filter: &Filter,
        after: Option<Cursor>,
        limit: i64,
    ) -> Result<Vec<Listed>, ReadError> {
        let Filter { status, key, started_before, step: _ } = filter;
        // a condition of its own for the index, which has only the instances with a key
        let by_key = if key.is_some() { "key = $4" } else { "$4::text is null" };
        let sql = format!(
            "select {COLUMNS} from weft.saga_instance
             where saga = $1 and ($2::text is null or state = $2) and {by_key}
               and started_at < coalesce($5::timestamptz, 'infinity')
               and started_at <= coalesce($6::timestamptz, 'infinity') and (started_at is distinct from $6 or id > $7::uuid)
             order by started_at desc, id limit $3"
        );
        let (at, id) = (after.map(|after| after.started_at), after.map(|after| after.id));
        let status = status.map(Status::as_str);
        let rows = self.query(&sql, &[&saga, &status, &limit, key, started_before, &at, &id]).await?;
        rows.iter().map(listed).collect()
    }

    /// The log of one instance.
    pub(super) async fn events(&self, id: Uuid) -> Result<Vec<Logged>, ReadError> {
        const SQL: &str = "select id, seq, at, body from weft.saga_event where id = $1 order by seq";
        let rows = self.query(SQL, &[&id]).await?;
        rows.iter().map(|row| logged(row)?.1).collect()
    }

    /// The logs of all live instances of a partition. Each is read separately, so that one that cannot be read does not
    /// affect the others.
    pub(super) async fn live_events(&self, partition: i16) -> Result<HashMap<Uuid, Log>, ReadError> {
        const SQL: &str =
            "select e.id, e.seq, e.at, e.body from weft.saga_instance i join weft.saga_event e using (id, bucket)
             where i.partition = $1 and i.state is null order by e.id, e.seq";
        let mut logs: HashMap<Uuid, Log> = HashMap::new();
        for row in self.query(SQL, &[&partition]).await? {
            let (id, event) = logged(&row)?;
            let log = logs.entry(id).or_insert_with(|| Ok(Vec::new()));
            match (log.as_mut(), event) {
                (Ok(events), Ok(event)) => events.push(event),
                (Ok(_), Err(error)) => *log = Err(error),
                (Err(_), _) => {}
            }
        }
        Ok(logs)
    }
}

fn listed(row: &tokio_postgres::Row) -> Result<Listed, ReadError> {
    let state: Option<&str> = row.try_get(5)?;
    Ok(Listed {
        id: row.try_get(0)?,
        bucket: row.try_get(6)?,
        saga: row.try_get(1)?,
        version: row.try_get(2)?,
        started_at: row.try_get(3)?,
        ended_at: row.try_get(4)?,
        state: state.and_then(Status::parse),
        key: row.try_get(7)?,
    })
}

fn logged(row: &tokio_postgres::Row) -> Result<(Uuid, Result<Logged, ReadError>), ReadError> {
    let (id, seq, at): (Uuid, i32, Timestamp) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let body: &str = row.try_get(3)?;
    let record = serde_json::from_str(body).map_err(|source| ReadError::Event { id, seq, source });
    Ok((id, record.map(|record| Logged { seq, at, record })))
}
