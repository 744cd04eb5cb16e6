//! `weft broker credentials|events`: commands for people about the broker that is installed with Weft.
//!
//! They need the right to read the Secret with the broker's keys, which the operator's own pod has:
//! `kubectl -n weft-system exec deploy/weft -- weft broker events shop`.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context, bail};
use async_nats::jetstream::{
    self,
    consumer::{DeliverPolicy, pull},
    context::GetStreamErrorKind,
};
use futures::StreamExt;
use jiff::Timestamp;
use kube::{Client, Config};

use crate::{
    controllers::runtime::broker,
    domain::event::{HEADER_SOURCE, HEADER_TYPE},
    nats::{self, Connection, Credentials, Server, accounts::Access},
    output,
};

/// Longest time between two events of a stream that has more.
const SILENCE: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Keys {
    /// Namespace of the operator
    #[arg(long, env = "POD_NAMESPACE", default_value = "weft-system")]
    operator_namespace: String,
    /// Name of the Secret with the broker's keys
    #[arg(long, env = "WEFT_BROKER_KEYS", default_value = "weft-nats")]
    keys: String,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print a credentials file for NATS clients: for the account of one namespace
    Credentials {
        /// The namespace
        namespace: String,
        /// What they allow: to read events (Consume), to publish (Publish), or everything (Administer)
        #[arg(long, value_enum, default_value_t = Access::Consume, ignore_case = true)]
        access: Access,
        /// Name of the user, shown in the server's list of connections
        #[arg(long, default_value = "person")]
        user: String,
        #[command(flatten)]
        keys: Keys,
    },
    /// Print the events of a namespace, a line each: sequence, source, type, data
    Events {
        /// The namespace
        namespace: String,
        /// Name of the stream
        #[arg(long, default_value = "events")]
        stream: String,
        /// The last so many events; all of them when left out
        #[arg(long)]
        last: Option<u64>,
        /// Print what comes too, until interrupted
        #[arg(long)]
        follow: bool,
        /// Address of the broker
        #[arg(long, env = "WEFT_BROKER_URL", default_value = "nats://localhost:4222")]
        broker_url: String,
        #[command(flatten)]
        keys: Keys,
    },
}

pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Credentials { namespace, access, user, keys } => {
            output::answer(&credentials(&keys, &namespace, &user, access).await?).context("writing the credentials")
        }
        Command::Events { namespace, stream, last, follow, broker_url, keys } => {
            let credentials = Credentials::Text(credentials(&keys, &namespace, "person", Access::Consume).await?);
            let connection =
                Connection::open(&Server { urls: vec![broker_url], credentials, inbox: None }, "weft broker events")
                    .await;
            let connection = connection.map_err(|outage| anyhow::anyhow!("{outage}"))?;
            print(connection, &stream, last, follow).await
        }
    }
}

async fn credentials(keys: &Keys, namespace: &str, user: &str, access: Access) -> anyhow::Result<String> {
    let config = Config::infer().await.context("finding the cluster: neither in a pod nor with a kubeconfig")?;
    let accounts = broker::accounts(&Client::try_from(config)?, &keys.operator_namespace, &keys.keys).await?;
    Ok(accounts.credentials(namespace, user, access))
}

async fn print(mut connection: Connection, stream: &str, last: Option<u64>, follow: bool) -> anyhow::Result<()> {
    let mut context = jetstream::new(connection.client.clone());
    context.set_timeout(nats::TIMEOUT);
    let found = match context.get_stream(stream).await {
        Ok(found) => found,
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.code() == 404 => bail!(
                "there is no stream `{stream}` in the account of this namespace: a relay makes it when it starts to publish"
            ),
            _ => bail!("{}", nats::jetstream_outage(connection.address(), Timestamp::now(), &error)),
        },
    };
    let state = &found.cached_info().state;
    let (first, newest) = (state.first_sequence, state.last_sequence);
    let begin = last.map_or(first, |last| first.max((newest + 1).saturating_sub(last)));
    if begin > newest && !follow {
        return Ok(());
    }
    let wanted = pull::OrderedConfig {
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: begin.max(1) },
        ..pull::OrderedConfig::default()
    };
    let mut messages = found.create_consumer(wanted).await?.messages().await?;
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            outage = connection.lost() => bail!("{outage}"),
            () = tokio::time::sleep(SILENCE), if !follow => bail!("the broker has more events and does not send them"),
        };
        let Some(message) = message.transpose()? else { return Ok(()) };
        let (sequence, pending) = message.info().map_or((0, 0), |info| (info.stream_sequence, info.pending));
        let header = |name: &str| {
            message.headers.as_ref().and_then(|headers| headers.get(name)).map_or("", |value| value.as_str())
        };
        let mut line = String::new();
        let data = String::from_utf8_lossy(&message.payload);
        let _ = writeln!(line, "{sequence}\t{}\t{}\t{data}", header(HEADER_SOURCE), header(HEADER_TYPE));
        output::answer(&line)?;
        if pending == 0 && !follow {
            return Ok(());
        }
    }
}
