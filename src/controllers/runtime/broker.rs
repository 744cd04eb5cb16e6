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
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client, ResourceExt,
    api::PostParams,
    core::ObjectMeta,
    runtime::{WatchStreamExt, watcher},
};
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
    let found = found.map_err(|error| refused("make", name, &error))?;
    let accounts = of_secret(&found)?;
    let config = accounts.server_config(ACCOUNTS_FOLDER);
    if entry(&found, SERVER_CONFIG).as_deref() != Some(&config) {
        let mut renewed = found;
        renewed.data.get_or_insert_default().insert(SERVER_CONFIG.to_owned(), ByteString(config.into_bytes()));
        if let Err(error) = within_deadline(secrets.replace(name, &post(), &renewed)).await {
            // the server goes on with what it has
            tracing::warn!(error = %refused("renew", name, &error), "the broker keeps an older configuration of its accounts");
        }
    }
    Ok(accounts)
}

/// Makes the Secret `name` again when it is deleted, with the same keys. Ends when somebody replaced it by one with others.
pub async fn keep_keys(client: Client, namespace: String, name: String, seed: String) {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let mut watched = std::pin::pin!(watcher::watch_object(secrets, &name).default_backoff());
    loop {
        match watched.next().await {
            Some(Ok(None)) => {
                while let Err(error) = ensure_accounts(&client, &namespace, &name, seed.clone()).await {
                    tracing::warn!(error = format!("{error:#}"), "the broker's keys are not there");
                    tokio::time::sleep(RETRY).await;
                }
                tracing::warn!(secret = name, "the Secret with the broker's keys was deleted: it is made again");
            }
            Some(Ok(Some(found))) => {
                if entry(&found, SEED).is_some_and(|now| now != seed) {
                    tracing::error!(
                        secret = name,
                        "the Secret with the broker's keys was replaced: starting again with those"
                    );
                    return;
                }
            }
            Some(Err(error)) => tracing::debug!(%error, "the Secret with the broker's keys cannot be watched"),
            None => return,
        }
    }
}

fn entry(secret: &Secret, key: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok()
}

fn refused(doing: &str, name: &str, error: &RequestError) -> anyhow::Error {
    anyhow!("cannot {doing} the Secret {name}: {}", error.message())
}

fn of_secret(secret: &Secret) -> anyhow::Result<Accounts> {
    let Some(seed) = entry(secret, SEED) else {
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
    let server = Server { urls: vec![url], credentials: Credentials::Text(accounts.system_credentials()), inbox: None };
    let mut since = None;
    loop {
        while context.accounts.other_than(&BTreeSet::new()).is_empty() {
            context.accounts.changed.notified().await;
        }
        let mut given = BTreeSet::new();
        let outage = match Connection::open(&server, "weft operator").await {
            Ok(mut connection) => give_all(&context, &accounts, &mut connection, &mut given, &mut since).await,
            Err(outage) => outage,
        };
        context.metrics.accounts_wait(context.accounts.other_than(&given).len());
        let first = since.is_none();
        let outage = outage.continued(&mut since);
        if first {
            tracing::warn!("namespaces that are new get no account of the broker: {outage}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Until the connection is lost, or the server refused an account; the others are given all the same.
async fn give_all(
    context: &Context,
    accounts: &Accounts,
    connection: &mut Connection,
    given: &mut BTreeSet<String>,
    since: &mut Option<Timestamp>,
) -> Outage {
    loop {
        let changed = context.accounts.changed.notified();
        let mut failed = None;
        for namespace in context.accounts.other_than(given) {
            match give(&connection.client, accounts.account(&namespace)).await {
                Ok(()) => {
                    tracing::info!(namespace, "the broker has the namespace's account");
                    given.insert(namespace);
                }
                Err(Failure::Refused(why)) => failed = Some(Failure::Refused(format!("{namespace}: {why}"))),
                Err(failure) => {
                    failed = Some(failure);
                    break;
                }
            }
        }
        if let Some(failure) = failed {
            let address = connection.address().to_owned();
            return Outage { server: "NATS", address, since: Timestamp::now(), failure };
        }
        *since = None;
        context.metrics.accounts_wait(0);
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
        Ok(Err(error)) => return Err(Failure::Refused(format!("its account was refused: {error}"))),
        Err(_elapsed) => return Err(Failure::Silent),
    };
    match serde_json::from_slice(&answer.payload) {
        Ok(Answer { error: None }) => Ok(()),
        Ok(Answer { error: Some(error) }) => {
            Err(Failure::Refused(format!("its account was refused: {}", error.description)))
        }
        Err(error) => Err(Failure::Refused(format!("the answer about an account cannot be read: {error}"))),
    }
}
