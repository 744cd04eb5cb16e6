//! `weft saga discover`: reads the events of a running system from its broker, and prints the choreographed sagas that they show.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, pull},
};
use futures::StreamExt;
use jiff::Timestamp;

use crate::{
    domain::{
        choreography::{
            definition::{Definition, Kind, Reaction},
            discovery::{Counted, Discovered, Miner},
            instance::Seen,
        },
        names,
    },
    nats::{self, Connection, Credentials, Server},
    output,
    saga::starts::received::Received,
    secret::SecretFolder,
};

use super::row::duration;

/// The server sends what it has; when it sends nothing for this time, everything was read.
const QUIET: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(in crate::saga) struct DiscoverArgs {
    /// The broker
    #[arg(long, env = "WEFT_NATS_URL", default_value = "nats://localhost:4222")]
    nats_url: String,
    /// A folder with the broker's credentials: files as in the Secret of a relay's `sink.nats`
    #[arg(long)]
    credentials: Option<PathBuf>,
    /// The stream with the services' events
    #[arg(long, default_value = "events")]
    stream: String,
    /// The namespace of the services; events of others are not read
    #[arg(long, default_value = "default")]
    namespace: String,
    /// How far back to read, in hours
    #[arg(long, default_value_t = 24)]
    hours: u32,
    /// At most so many events are read
    #[arg(long, default_value_t = 200_000)]
    limit: usize,
}

pub(in crate::saga) async fn run(args: DiscoverArgs) -> anyhow::Result<()> {
    let miner = read(&args).await?;
    let found = miner.discover();
    let (events, namespace) = (miner.events(), &args.namespace);
    if found.is_empty() {
        bail!(
            "{events} events of namespace {namespace} were read in the stream `{}`, and none is a reaction to another: services must emit with the header `causationid`, the id of the event that they react to",
            args.stream
        );
    }
    let mut text =
        format!("# From {events} events of namespace {namespace}. Check which events complete and which compensate.\n");
    for discovered in &found {
        text.push_str(&manifest(discovered, namespace));
    }
    output::answer(&text).context("writing the answer")
}

/// Reads the stream with a consumer that the server deletes when it is not read any more. Nothing is acknowledged.
async fn read(args: &DiscoverArgs) -> anyhow::Result<Miner> {
    let DiscoverArgs { nats_url, credentials, stream, namespace, hours, limit } = args;
    let credentials = match credentials {
        Some(folder) => Credentials::Secret(SecretFolder::new(Some(folder.clone()))),
        None => Credentials::None,
    };
    let server = Server { urls: vec![nats_url.clone()], credentials, inbox: None };
    let connection = Connection::open(&server, "weft saga discover").await;
    let connection =
        connection.map_err(|outage| anyhow::anyhow!("{outage}; give --nats-url, or forward a port to it"))?;
    let mut context = jetstream::new(connection.client.clone());
    context.set_timeout(nats::TIMEOUT);
    let found = context.get_stream(stream).await;
    let found =
        found.with_context(|| format!("there is no stream `{stream}` at {}; give --stream", connection.address()))?;
    let since = Timestamp::now() - Duration::from_secs(3_600 * u64::from(*hours));
    let start_time =
        async_nats::datetime::from_nanos(since.as_nanosecond()).map_err(|error| anyhow::anyhow!("{error}"))?;
    let config = pull::Config {
        deliver_policy: DeliverPolicy::ByStartTime { start_time },
        ack_policy: AckPolicy::None,
        ..pull::Config::default()
    };
    let consumer = found
        .create_consumer(config)
        .await
        .context("reading the stream; a work queue cannot be read beside its consumer")?;
    let mut unread = consumer.cached_info().num_pending;
    let mut messages = consumer.messages().await.context("reading the stream")?;
    let mut miner = Miner::default();
    while unread > 0 && miner.events() < *limit {
        let Ok(Some(message)) = tokio::time::timeout(QUIET, messages.next()).await else { break };
        let message = message.context("reading the stream")?;
        unread = message.info().map_or(0, |info| info.pending);
        if let Some(event) = seen(&message, namespace) {
            miner.observe(event);
        }
    }
    Ok(miner)
}

fn seen(message: &jetstream::Message, namespace: &str) -> Option<Seen> {
    let received = Received::attributes(message);
    let source = received.source?;
    let prefix = names::event_source(namespace, "");
    let service = source.strip_prefix(&prefix).filter(|service| !service.is_empty())?.to_owned();
    let published =
        message.info().ok().and_then(|info| Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).ok());
    let recorded = received.time.and_then(|time| time.parse().ok()).or(published);
    Some(Seen {
        kind: Kind { service, event: received.kind?.into_owned() },
        id: received.id?.into_owned(),
        cause: received.causation.map(std::borrow::Cow::into_owned),
        at: recorded?.as_millisecond(),
    })
}

/// A `Saga` with comments that say how often each part was seen.
fn manifest(discovered: &Discovered, namespace: &str) -> String {
    let Discovered { definition, starts, reactions, events } = discovered;
    let Definition { name, start, .. } = definition;
    let mut text = format!(
        "---\napiVersion: weft.dev/v1alpha1\nkind: Saga\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  style: Choreography\n  startOn: {}   # {starts} times\n  reactions:\n",
        event(start)
    );
    for (reaction, counted) in definition.reactions.iter().zip(reactions) {
        let Reaction { to, service, emits, within_ms, .. } = reaction;
        let Counted { reacted, causes, outcomes, longest_ms } = counted;
        let often = outcomes.iter().map(|(event, count)| format!("{event} {count}")).collect::<Vec<_>>().join(", ");
        let emits = emits.iter().map(|event| quoted(event)).collect::<Vec<_>>().join(", ");
        let _ = write!(
            text,
            "  # to {reacted} of {causes}; {often}; the longest took {longest_ms} ms\n  - to: {}\n    service: {service}\n    emits: [{emits}]\n    within: {}\n",
            event(to),
            duration(*within_ms)
        );
    }
    for (field, kinds) in [("completes", &definition.completes), ("compensates", &definition.compensates)] {
        if !kinds.is_empty() {
            let _ = writeln!(text, "  {field}:");
        }
        for kind in kinds {
            let count = events.get(kind).copied().unwrap_or_default();
            let _ = writeln!(text, "  - {}   # {count} times", event(kind));
        }
    }
    text
}

fn event(kind: &Kind) -> String {
    format!("{{service: {}, event: {}}}", quoted(&kind.service), quoted(&kind.event))
}

/// A word as it is, anything else as a string of JSON, which is one of YAML.
fn quoted(text: &str) -> String {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str());
    if is_word { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_discovered_is_a_manifest_that_says_how_often() {
        let mut miner = Miner::default();
        let mut seen = |service: &str, event: &str, id: String, cause: Option<String>, at: i64| {
            miner.observe(Seen { kind: Kind::new(service, event), id, cause, at });
        };
        for order in 0..3 {
            let (credit, end) =
                if order == 0 { ("CreditLimitExceeded", "OrderRejected") } else { ("CreditReserved", "OrderApproved") };
            seen("orders", "OrderCreated", format!("c{order}"), None, 0);
            seen("customers", credit, format!("r{order}"), Some(format!("c{order}")), 300);
            seen("orders", end, format!("e{order}"), Some(format!("r{order}")), 400);
        }
        insta::assert_snapshot!(manifest(&miner.discover()[0], "shop"));
    }

    #[test]
    fn what_yaml_reads_otherwise_is_quoted() {
        for (text, written) in
            [("OrderCreated", "OrderCreated"), ("7", "\"7\""), ("No", "\"No\""), ("a: b", "\"a: b\"")]
        {
            assert_eq!(quoted(text), written);
        }
    }
}
