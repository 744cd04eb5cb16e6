//! `weft saga list|show|start|retry|…`: commands for people, on top of the orchestrator's API.

mod form;
mod watch;

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::builder::NonEmptyStringValueParser;
use reqwest::{Method, Url};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::form::{history, table};
use super::{batch::Applied, view::View};
use crate::output::{self, Format};

const DEADLINE: Duration = Duration::from_secs(90);
/// Instances of one page of a list.
const PAGE: usize = 1_000;
const NOT_OURS: &str = "the answer is not an orchestrator's; is --orchestrator-url right?";

#[derive(Debug, clap::Args)]
pub struct Endpoint {
    /// The address of the orchestrator's API, such as http://default-orchestrator.shop:8080
    #[arg(long, env = "WEFT_ORCHESTRATOR_URL", default_value = "http://localhost:8080")]
    orchestrator_url: String,
    /// Form of the answer; json is the API's
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, clap::Args)]
pub struct InstanceArgs {
    /// The saga's name
    saga: String,
    /// The instance's id or business key; of a choreographed saga its id or the correlation of its events
    id: String,
    #[command(flatten)]
    endpoint: Endpoint,
}

/// Which instances are meant; all that is given must hold.
#[derive(Clone, Debug, clap::Args)]
pub struct FilterArgs {
    /// Only those that are Running, Compensating, Stuck, Completed or Compensated
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    state: Option<String>,
    /// Only those with this business key
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Only those of which this step is in progress, as in the column STEP
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    step: Option<String>,
    /// Only those that started longer ago, such as 90m or 24h
    #[arg(long, value_name = "DURATION", value_parser = NonEmptyStringValueParser::new())]
    older_than: Option<String>,
}

/// What the history says of a verb.
#[derive(Clone, Debug, clap::Args)]
pub struct AuditArgs {
    /// Who asks for it
    #[arg(long, env = "USER", hide_env_values = true)]
    by: Option<String>,
    /// Why
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct SkipArgs {
    #[command(flatten)]
    instance: InstanceArgs,
    /// Only this step, as in the column STEP, where several are stuck
    #[arg(long)]
    step: Option<String>,
    #[command(flatten)]
    audit: AuditArgs,
}

#[derive(Debug, clap::Args)]
pub struct VerbArgs {
    /// The saga's name
    saga: String,
    /// The instance's id or business key; without it, the options say which of the running instances are meant
    #[arg(conflicts_with_all = ["state", "key", "older_than", "all"])]
    id: Option<String>,
    #[command(flatten)]
    filter: FilterArgs,
    /// Every running instance of the saga; with --step, every one at that step
    #[arg(long, conflicts_with_all = ["state", "key", "older_than"])]
    all: bool,
    #[command(flatten)]
    audit: AuditArgs,
    #[command(flatten)]
    endpoint: Endpoint,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List a saga's instances, the latest first
    List {
        /// The saga's name
        saga: String,
        #[command(flatten)]
        filter: FilterArgs,
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Go on, and print what changes, each second
        #[arg(short, long)]
        watch: bool,
        #[command(flatten)]
        endpoint: Endpoint,
    },
    /// Show an instance with its history
    Show {
        #[command(flatten)]
        instance: InstanceArgs,
        /// Go on, and print what happens until the instance ends
        #[arg(short, long)]
        watch: bool,
    },
    /// Start an instance and wait for its end, for a minute at most
    Start {
        /// The saga's name
        saga: String,
        /// Its input, as JSON
        #[arg(default_value = "{}")]
        input: String,
        /// A second start with the same key starts nothing
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        endpoint: Endpoint,
    },
    /// Send an instance a signal, perhaps before it waits for it
    Signal {
        #[command(flatten)]
        instance: InstanceArgs,
        /// The step that waits for it
        signal: String,
        /// What it says, as JSON: the step's reply
        #[arg(default_value = "{}")]
        body: String,
        /// A repetition with the same key changes nothing
        #[arg(long)]
        key: Option<String>,
    },
    /// Make the calls that are stuck again at once, with a new allowance of attempts
    Retry(VerbArgs),
    /// Treat the stuck call as done; of a choreographed saga, give up what is owed
    Skip(SkipArgs),
    /// Compensate, before the pivot; pause a stuck pivot first
    Cancel(VerbArgs),
    /// Make no further call until `resume`
    Pause(VerbArgs),
    /// Continue after a pause
    Resume(VerbArgs),
}

pub(super) async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { saga, filter, limit, watch, endpoint } => {
            let mut url = endpoint.url(&["sagas", &saga])?;
            url.query_pairs_mut().extend_pairs(filter.pairs());
            if watch {
                return watch::list(&url, limit, endpoint.output).await;
            }
            let list = list(&url, limit).await?;
            output::print(endpoint.output, &list, || table(&list.items))
        }
        Command::Show { instance: InstanceArgs { saga, id, endpoint }, watch } => {
            let url = endpoint.url(&["sagas", &saga, &id])?;
            if watch {
                return watch::show(&url, endpoint.output).await;
            }
            print(&endpoint, &request(Method::GET, url, None).await?, |detail| history(&detail))
        }
        Command::Start { saga, input, key, endpoint } => {
            let mut url = endpoint.url(&["sagas", &saga])?;
            url.query_pairs_mut().append_pair("wait", "true");
            let text = request(Method::POST, url, Some((input, key))).await?;
            print(&endpoint, &text, |view: View| table(&[view]))
        }
        Command::Signal { instance: InstanceArgs { saga, id, endpoint }, signal, body, key } => {
            let url = endpoint.url(&["sagas", &saga, &id, "signals", &signal])?;
            let text = request(Method::POST, url, Some((body, key))).await?;
            print(&endpoint, &text, |view: View| table(&[view]))
        }
        Command::Retry(verb) => change(verb, "retry").await,
        Command::Skip(SkipArgs { instance: InstanceArgs { saga, id, endpoint }, step, audit }) => {
            let step = step.map(|step| ("step", step)).into_iter();
            change_one(&endpoint, &["sagas", &saga, &id, "skip"], step.chain(audit.pairs())).await
        }
        Command::Cancel(verb) => change(verb, "cancel").await,
        Command::Pause(verb) => change(verb, "pause").await,
        Command::Resume(verb) => change(verb, "resume").await,
    }
}

type Pair = (&'static str, String);

impl FilterArgs {
    /// As query parameters.
    fn pairs(&self) -> impl Iterator<Item = Pair> {
        let Self { state, key, step, older_than } = self.clone();
        let pairs = [("state", state), ("key", key), ("step", step), ("olderThan", older_than)];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

impl AuditArgs {
    /// As query parameters.
    fn pairs(&self) -> impl Iterator<Item = Pair> {
        let Self { by, reason } = self.clone();
        [("by", by), ("reason", reason)].into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

#[derive(Default, Serialize, Deserialize)]
struct List {
    items: Vec<View>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// At most `limit` instances, page by page.
async fn list(url: &Url, limit: usize) -> anyhow::Result<List> {
    let mut list = List::default();
    loop {
        let mut page = url.clone();
        let left = (limit - list.items.len()).min(PAGE).to_string();
        page.query_pairs_mut().append_pair("limit", &left).extend_pairs(list.next.map(|next| ("after", next)));
        let text = request(Method::GET, page, None).await?;
        let List { items, next } = serde_json::from_str(&text).context(NOT_OURS)?;
        list.items.extend(items);
        list.next = next;
        if list.next.is_none() || list.items.len() >= limit {
            return Ok(list);
        }
    }
}

async fn change(verb: VerbArgs, name: &str) -> anyhow::Result<()> {
    let VerbArgs { saga, id, filter, all, audit, endpoint } = verb;
    if let Some(id) = id {
        return change_one(&endpoint, &["sagas", &saga, &id, name], filter.pairs().chain(audit.pairs())).await;
    }
    if !all && filter.pairs().all(|(name, _)| name == "step") {
        bail!(
            "name an instance, or several by --state, --key or --older-than; --all means every one that runs, with --step every one at that step"
        );
    }
    let mut url = endpoint.url(&["sagas", &saga, "batch", name])?;
    let all = all.then(|| ("all", "true".to_owned()));
    url.query_pairs_mut().extend_pairs(filter.pairs().chain(audit.pairs()).chain(all));
    let mut total = Applied::default();
    let mut next = None;
    loop {
        let mut page = url.clone();
        page.query_pairs_mut().extend_pairs(next.map(|id: uuid::Uuid| ("after", id.to_string())));
        let text = request(Method::POST, page, None).await;
        let text = match total.changed {
            0 => text?,
            changed => text.with_context(|| format!("after {changed} instances were changed"))?,
        };
        let changed: Applied = serde_json::from_str(&text).context(NOT_OURS)?;
        next = changed.next;
        total.add(changed);
        if next.is_none() {
            return output::print(endpoint.output, &total, || total.to_string());
        }
    }
}

async fn change_one(endpoint: &Endpoint, path: &[&str], query: impl Iterator<Item = Pair>) -> anyhow::Result<()> {
    let mut url = endpoint.url(path)?;
    url.query_pairs_mut().extend_pairs(query);
    let text = request(Method::POST, url, None).await?;
    print(endpoint, &text, |view: View| table(&[view]))
}

impl Endpoint {
    /// The address of a resource of the API. The segments may contain any characters.
    fn url(&self, segments: &[&str]) -> anyhow::Result<Url> {
        let given = &self.orchestrator_url;
        let example = "give one such as http://default-orchestrator.shop:8080";
        let mut url =
            Url::parse(given).with_context(|| format!("--orchestrator-url {given:?} is no URL; {example}"))?;
        url.path_segments_mut()
            .map_err(|()| anyhow!("--orchestrator-url {given:?} names no server; {example}"))?
            .pop_if_empty()
            .extend(segments);
        Ok(url)
    }
}

async fn request(method: Method, url: Url, body: Option<(String, Option<String>)>) -> anyhow::Result<String> {
    #[derive(Deserialize)]
    struct Problem {
        detail: String,
    }
    let server = url.origin().ascii_serialization();
    let client = reqwest::Client::builder().timeout(DEADLINE).build().context("making an HTTP client")?;
    let mut request = client.request(method, url);
    if let Some((body, key)) = body {
        request = request.header("content-type", "application/json").body(body);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
    }
    let unreachable =
        || format!("no orchestrator answers at {server}; give --orchestrator-url, or forward a port to its Service");
    let response = request.send().await.map_err(reqwest::Error::without_url).with_context(unreachable)?;
    let status = response.status();
    let text = response.text().await.with_context(|| format!("reading the answer of {server}"))?;
    if status.is_success() {
        return Ok(text);
    }
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => bail!(problem.detail),
        Err(_) if text.contains('<') || text.trim().is_empty() => {
            bail!("{server} answers {status}, and not as an orchestrator does; is --orchestrator-url right?")
        }
        Err(_) => bail!("{server} answers {status}: {text}"),
    }
}

fn print<T: DeserializeOwned>(endpoint: &Endpoint, text: &str, form: impl FnOnce(T) -> String) -> anyhow::Result<()> {
    let answer = serde_json::from_str(text).context(NOT_OURS)?;
    let text = match endpoint.output {
        Format::Json => format!("{}\n", text.trim_end()),
        Format::Table => form(answer),
    };
    output::answer(&text).context("writing the answer")
}
