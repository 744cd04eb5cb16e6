//! The broker that is installed with Weft: its keys are in a Secret that the operator makes once, and each namespace that has
//! relays or orchestrators gets an account.
//!
//! The server keeps the accounts on its volume. They are given to it again on each connection, which changes nothing on one that
//! has them, and everything on one whose volume is gone.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{anyhow, bail};
use async_nats::Client as NatsClient;
use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Api, Client, ResourceExt, api::PostParams, core::ObjectMeta};
use serde::Deserialize;
use tokio::{sync::Notify, time::timeout};

use super::Context;
use crate::{
    controllers::{
        request::{RequestError, within_deadline},
        resources::{
            labels::{FIELD_MANAGER, MANAGED_BY, MANAGED_BY_LABEL},
            settings::Broker,
        },
    },
    nats::{self, Connection, Credentials, Server, accounts::Accounts},
    outage::{Failure, Outage},
};

/// Keys of the Secret. The server mounts the second one alone.
const SEED: &str = "seed";
const SERVER_CONFIG: &str = "accounts.conf";
/// Where the server keeps the accounts that it was given, on its volume.
const ACCOUNTS_FOLDER: &str = "/data/accounts";
/// Pause between two attempts to connect.
const RETRY: Duration = Duration::from_secs(2);
/// Subject by which an account is given to a server, or renewed.
const UPDATE: &str = "$SYS.REQ.CLAIMS.UPDATE";

/// The namespaces that need an account.
#[derive(Debug, Default)]
pub struct WantedAccounts {
    namespaces: Mutex<BTreeSet<String>>,
    changed: Notify,
}

impl WantedAccounts {
    pub fn want(&self, namespace: &str) {
        let mut namespaces = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        if !namespaces.contains(namespace) {
            namespaces.insert(namespace.to_owned());
            self.changed.notify_one();
        }
    }

    fn other_than(&self, given: &BTreeSet<String>) -> Vec<String> {
        let namespaces = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        namespaces.difference(given).cloned().collect()
    }
}

/// The accounts of the Secret `name`.
pub async fn accounts(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Accounts> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = within_deadline(secrets.get(name)).await;
    of_secret(&found.map_err(|error| refused("read", name, &error))?)
}

/// The accounts of the Secret `name`, which is made of `seed` when it is missing.
pub async fn ensure_accounts(client: &Client, namespace: &str, name: &str, seed: String) -> anyhow::Result<Accounts> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = match within_deadline(secrets.get_opt(name)).await {
        Ok(None) => match within_deadline(secrets.create(&post(), &secret(name, seed))).await {
            // another replica was faster
            Err(error) if error.code() == Some(409) => within_deadline(secrets.get(name)).await,
            made => made,
        },
        Ok(Some(found)) => Ok(found),
        Err(error) => Err(error),
    };
    let secret = found.map_err(|error| refused("make", name, &error))?;
    let accounts = of_secret(&secret)?;
    let config = accounts.server_config(ACCOUNTS_FOLDER);
    if secret.data.as_ref().and_then(|data| data.get(SERVER_CONFIG)).is_none_or(|found| found.0 != config.as_bytes()) {
        let mut renewed = secret;
        renewed.data.get_or_insert_default().insert(SERVER_CONFIG.to_owned(), ByteString(config.into_bytes()));
        let replaced = within_deadline(secrets.replace(name, &post(), &renewed)).await;
        replaced.map_err(|error| refused("renew", name, &error))?;
    }
    Ok(accounts)
}

fn refused(doing: &str, name: &str, error: &RequestError) -> anyhow::Error {
    anyhow!("cannot {doing} the Secret {name}: {}", error.message())
}

fn of_secret(secret: &Secret) -> anyhow::Result<Accounts> {
    let seed = secret.data.as_ref().and_then(|data| data.get(SEED)).map(|seed| String::from_utf8(seed.0.clone()));
    let Some(Ok(seed)) = seed else {
        bail!(
            "the Secret {} has no `{SEED}`: restore it, or delete it and the broker's volume, with all events",
            secret.name_any()
        );
    };
    Ok(Accounts::new(seed))
}

fn post() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

fn secret(name: &str, seed: String) -> Secret {
    let config = Accounts::new(seed.clone()).server_config(ACCOUNTS_FOLDER);
    let entries = [(SEED, seed), (SERVER_CONFIG, config)];
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned())].into()),
            ..ObjectMeta::default()
        },
        data: Some(entries.map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).into()),
        ..Secret::default()
    }
}

/// Gives the accounts to the server as they are needed. Never ends.
pub async fn run(context: Arc<Context>, broker: Broker) {
    let Broker { url, accounts } = broker;
    let server = Server { url, credentials: Credentials::Text(accounts.system_credentials()) };
    let mut since = None;
    loop {
        while context.accounts.other_than(&BTreeSet::new()).is_empty() {
            context.accounts.changed.notified().await;
        }
        let outage = match Connection::open(&server, "weft operator").await {
            Ok(mut connection) => give_all(&context.accounts, &accounts, &mut connection, &mut since).await,
            Err(outage) => outage,
        };
        let first = since.is_none();
        let outage = outage.continued(&mut since);
        if first {
            tracing::warn!("namespaces that are new get no account of the broker: {outage}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Until the connection is lost, or the server refuses an account.
async fn give_all(
    wanted: &WantedAccounts,
    accounts: &Accounts,
    connection: &mut Connection,
    since: &mut Option<Timestamp>,
) -> Outage {
    let mut given = BTreeSet::new();
    loop {
        let changed = wanted.changed.notified();
        for namespace in wanted.other_than(&given) {
            if let Err(failure) = give(&connection.client, accounts.account(&namespace)).await {
                let address = connection.address().to_owned();
                return Outage { server: "NATS", address, since: Timestamp::now(), failure };
            }
            tracing::info!(namespace, "the broker has the namespace's account");
            given.insert(namespace);
        }
        *since = None;
        tokio::select! { () = changed => {} outage = connection.lost() => return outage }
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    error: Option<AnswerError>,
}

#[derive(Deserialize)]
struct AnswerError {
    #[serde(default)]
    description: String,
}

async fn give(client: &NatsClient, account: String) -> Result<(), Failure> {
    let answer = match timeout(nats::TIMEOUT, client.request(UPDATE, account.into())).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(Failure::Refused(format!("an account was not taken: {error}"))),
        Err(_elapsed) => return Err(Failure::Silent),
    };
    match serde_json::from_slice(&answer.payload) {
        Ok(Answer { error: None }) => Ok(()),
        Ok(Answer { error: Some(error) }) => {
            Err(Failure::Refused(format!("an account was not taken: {}", error.description)))
        }
        Err(error) => Err(Failure::Refused(format!("the answer about an account cannot be read: {error}"))),
    }
}
