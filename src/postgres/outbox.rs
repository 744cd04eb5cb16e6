//! What the server has for one outbox, by name: several services may have theirs in one database, or on one server.

use super::login::{Address, LoginError, schema};
use crate::{
    contract::{DatabaseLogin, Server},
    domain::names,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// Of Weft's tables. It is the search path of every session.
    pub schema: String,
    pub publication: String,
    pub slot: String,
}

impl Outbox {
    pub async fn of(login: &DatabaseLogin) -> Result<Self, LoginError> {
        let schema = schema(login).to_owned();
        let publication = names::publication(&schema);
        // a slot's name is the server's, which Weft does not have to itself there
        let slot = match login.server {
            Server::Address { .. } => publication.clone(),
            Server::Folder { .. } => names::slot_of_database(&publication, &Address::of(&login.server).await?.database),
        };
        Ok(Self { schema, publication, slot })
    }
}
