//! The replication slot that a deleted OutboxRelay leaves: the server would keep its log for it until the limit.

use postgres_protocol::escape::escape_identifier;

use super::{DatabaseError, session};
use crate::{
    contract::{DatabaseLogin, Role, database_setup::DatabaseSetup},
    postgres::outbox::Outbox,
};

const DOING: &str = "remove the replication slot of an OutboxRelay that is gone";

/// Whatever the server says may be otherwise later, and nobody waits for this.
fn tried_again(error: DatabaseError) -> DatabaseError {
    match error {
        DatabaseError::Refused { refusal, .. } => {
            DatabaseError::Passing { doing: DOING.to_owned(), why: refusal.to_string() }
        }
        DatabaseError::LoginRefused { role, refusal, .. } => DatabaseError::Passing {
            doing: DOING.to_owned(),
            why: format!("the server does not let role {role} in: {refusal}"),
        },
        other => other,
    }
}

/// Removes the slot of the relay whose role is `role`, if there is one. It is done as that role, which a database has too that a
/// person sets up. A relay that still streams from the slot keeps it, and this is tried again. The ledger is written first: a relay
/// that finds a position in it and no slot would report that its log was lost.
pub async fn remove(setup: &DatabaseSetup, role: &Role, weft: &str) -> Result<(), DatabaseError> {
    let login = DatabaseLogin { role: role.clone(), schema: Some(weft.to_owned()), ..setup.admin.clone() };
    let slot = Outbox::of(&login).await.map_err(DatabaseError::of_the_files)?.slot;
    let relay = session::as_role(setup, role).await.map_err(tried_again)?.client;
    let failed = |error| tried_again(DatabaseError::while_doing(DOING)(error));
    let weft = escape_identifier(weft);
    let ledger = format!("update {weft}.relay_ledger set lsn = null, updated_at = now() where lsn is not null");
    relay.execute(&ledger, &[]).await.map_err(&failed)?;
    let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                where slot_name = $1 and database = current_database()";
    if relay.execute(drop, &[&slot]).await.map_err(&failed)? > 0 {
        tracing::info!(slot, "the replication slot of an OutboxRelay that is gone is removed");
    }
    Ok(())
}
