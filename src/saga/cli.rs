//! `weft saga list|show|start|retry|…`: commands for people, on top of the orchestrator's API.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context, anyhow, bail};
use reqwest::{Method, Url};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    batch::Changed,
    view::{Current, Detail, Owed, Transition, View},
};
use crate::{
    domain::saga::event::Audit,
    output::{self, Format},
};

const DEADLINE: Duration = Duration::from_secs(90);
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
    #[arg(long)]
    state: Option<String>,
    /// Only those with this business key
    #[arg(long)]
    key: Option<String>,
    /// Only those of which this step is in progress, as in the column STEP
    #[arg(long)]
    step: Option<String>,
    /// Only those that started longer ago, such as 90m or 24h
    #[arg(long, value_name = "DURATION")]
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
    /// Every running instance of the saga
    #[arg(long, conflicts_with_all = ["state", "key", "step", "older_than"])]
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
        #[command(flatten)]
        endpoint: Endpoint,
    },
    /// Show an instance with its history
    Show(InstanceArgs),
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
        Command::List { saga, filter, limit, endpoint } => {
            let mut url = endpoint.url(&["sagas", &saga])?;
            url.query_pairs_mut().append_pair("limit", &limit.to_string()).extend_pairs(filter.pairs());
            let text = request(Method::GET, url, None).await?;
            print(&endpoint, &text, |list: List| table(&list.items))
        }
        Command::Show(InstanceArgs { saga, id, endpoint }) => {
            let text = request(Method::GET, endpoint.url(&["sagas", &saga, &id])?, None).await?;
            print(&endpoint, &text, |detail| history(&detail))
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

#[derive(Deserialize)]
struct List {
    items: Vec<View>,
}

async fn change(verb: VerbArgs, name: &str) -> anyhow::Result<()> {
    let VerbArgs { saga, id, filter, all, audit, endpoint } = verb;
    if let Some(id) = id {
        return change_one(&endpoint, &["sagas", &saga, &id, name], filter.pairs().chain(audit.pairs())).await;
    }
    if !all && filter.pairs().next().is_none() {
        bail!(
            "name an instance, or several by --state, --step, --key or --older-than; --all means every one that runs"
        );
    }
    let mut url = endpoint.url(&["sagas", &saga, "batch", name])?;
    let all = all.then(|| ("all", "true".to_owned()));
    url.query_pairs_mut().extend_pairs(filter.pairs().chain(audit.pairs()).chain(all));
    let mut total = Changed::default();
    let mut next = None;
    loop {
        let mut page = url.clone();
        page.query_pairs_mut().extend_pairs(next.map(|id: uuid::Uuid| ("after", id.to_string())));
        let done = format!("{} instances were changed before that", total.changed);
        let text = request(Method::POST, page, None).await.context(done)?;
        let changed: Changed = serde_json::from_str(&text).context(NOT_OURS)?;
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

fn table(views: &[View]) -> String {
    let head = ["ID", "KEY", "STATE", "STEP", "STARTED", "REASON"].map(str::to_owned);
    let rows = views.iter().map(|view| {
        // of many, what needs a person is said first
        let current = view.current.iter().find(|current| current.stuck.is_some()).or(view.current.first());
        let step = current.map_or_else(
            || owed(view),
            |current| match view.current.len() {
                1 => in_progress(current),
                count => format!("{}, and {} more", in_progress(current), count - 1),
            },
        );
        let stuck = current.and_then(|current| current.stuck.clone());
        let reason = stuck.or_else(|| view.failure.as_ref().map(|failure| failure.reason.clone())).unwrap_or_default();
        [
            view.id.to_string(),
            view.key.clone().unwrap_or_default(),
            state(view),
            step,
            format!("{:.0}", view.started_at),
            reason,
        ]
    });
    output::columns(std::iter::once(head).chain(rows).collect())
}

/// `customers owes CreditReserved or CreditLimitExceeded`, of the most urgent that is owed.
fn owed(view: &View) -> String {
    let more = if view.owed.len() > 1 { format!(", and {} more", view.owed.len() - 1) } else { String::new() };
    let first = view.owed.first();
    first.map_or_else(String::new, |owed| format!("{} owes {}{more}", owed.service, owed.events.join(" or ")))
}

fn in_progress(current: &Current) -> String {
    let attempt = if current.attempt > 1 { format!(" (attempt {})", current.attempt) } else { String::new() };
    format!("{} {}{attempt}", current.operation, current.step)
}

fn state(view: &View) -> String {
    let mut text = view.state.as_str().to_owned();
    for (flag, suffix) in [(view.paused, " (paused)"), (view.overdue, " (overdue)")] {
        if flag {
            text.push_str(suffix);
        }
    }
    text
}

fn history(detail: &Detail) -> String {
    let view = &detail.view;
    let mut text = format!(
        "Saga:     {} (version {})\nInstance: {}\nState:    {}\n",
        view.saga,
        view.version,
        view.id,
        state(view)
    );
    if let Some(key) = &view.key {
        let _ = writeln!(text, "Key:      {key}");
    }
    for current in &view.current {
        let until = current.until.map_or_else(String::new, |until| format!(", until {until:.0}"));
        let _ = writeln!(text, "Current:  {} {}, attempt {}{until}", current.operation, current.step, current.attempt);
        if let Some(stuck) = &current.stuck {
            let next = if current.waits_for_a_person {
                "waits for `retry`, `skip` or `cancel`"
            } else {
                "is retried automatically"
            };
            let _ = writeln!(text, "Stuck:    {stuck}; {next}");
        }
    }
    if let Some(failure) = &view.failure {
        let _ = writeln!(text, "Failure:  {} at {}: {}", failure.reason, failure.step, failure.message);
    }
    for Owed { service, events, to, since, due } in &view.owed {
        let events = events.join(" or ");
        let _ = writeln!(text, "Owed:     {service} owes {events} to {to} since {since:.3}, due {due:.3}");
    }
    let head = if let Some(correlation) = &view.correlation_id {
        let _ = writeln!(text, "Events:   of correlation {correlation}\n");
        ["TIME", "SERVICE", "EVENT", "OUTCOME", "DETAIL"]
    } else {
        let _ = writeln!(text, "Input:    {}", detail.input);
        if let Some(output) = &view.output {
            let _ = writeln!(text, "Output:   {output}");
        }
        text.push('\n');
        ["TIME", "STEP", "OPERATION", "OUTCOME", "DETAIL"]
    };
    let head = head.map(str::to_owned);
    let rows = detail.history.iter().map(|transition| {
        [
            format!("{:.3}", transition.time),
            transition.step.clone().unwrap_or_default(),
            transition.operation.clone().unwrap_or_default(),
            outcome(transition),
            explanation(transition),
        ]
    });
    text.push_str(&output::columns(std::iter::once(head).chain(rows).collect()));
    text
}

fn explanation(transition: &Transition) -> String {
    let text =
        [transition.code.clone(), transition.message.clone()].into_iter().flatten().collect::<Vec<_>>().join(": ");
    let id = transition.event_id.as_ref().map(|id| format!("id {id}"));
    let Audit { by, reason } = &transition.audit;
    let by = by.as_ref().map(|by| format!("by {by}"));
    let audit = by.into_iter().chain(reason.clone()).collect::<Vec<_>>().join(": ");
    [text, audit].into_iter().filter(|text| !text.is_empty()).chain(id).collect::<Vec<_>>().join("; ")
}

fn outcome(transition: &Transition) -> String {
    match transition.attempt {
        Some(attempt) if attempt > 1 => format!("{} (attempt {attempt})", transition.outcome),
        _ => transition.outcome.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choreography_s_history_says_who_owes_what() {
        let detail: Detail = serde_json::from_value(serde_json::json!({
            "id": "0192f3a4-0000-5000-8000-000000000001", "saga": "create-order", "version": "1f2e", "correlationId": "c-1",
            "state": "Stuck", "startedAt": "2026-11-23T12:04:00Z",
            "owed": [{"service": "customers", "events": ["CreditReserved", "CreditLimitExceeded"], "to": "OrderCreated",
                      "since": "2026-11-23T12:04:00Z", "due": "2026-11-23T12:04:05Z"}],
            "history": [
                {"time": "2026-11-23T12:04:00Z", "step": "orders", "operation": "OrderCreated", "outcome": "started", "state": "Stuck"},
                {"time": "2026-11-23T12:04:01Z", "step": "customers", "operation": "CreditChecked", "outcome": "undeclared",
                 "message": "in reaction to OrderCreated", "eventId": "7", "state": "Stuck"},
            ],
        }))
        .unwrap();
        insta::assert_snapshot!(history(&detail), @r"
        Saga:     create-order (version 1f2e)
        Instance: 0192f3a4-0000-5000-8000-000000000001
        State:    Stuck
        Owed:     customers owes CreditReserved or CreditLimitExceeded to OrderCreated since 2026-11-23T12:04:00.000Z, due 2026-11-23T12:04:05.000Z
        Events:   of correlation c-1

        TIME                       SERVICE     EVENT           OUTCOME      DETAIL
        2026-11-23T12:04:00.000Z   orders      OrderCreated    started
        2026-11-23T12:04:01.000Z   customers   CreditChecked   undeclared   in reaction to OrderCreated; id 7
        ");
        assert!(table(&[detail.view]).contains("Stuck   customers owes CreditReserved or CreditLimitExceeded   "));
    }

    #[test]
    fn a_history_reads_from_top_to_bottom() {
        let detail: Detail = serde_json::from_value(serde_json::json!({
            "id": "0192f3a4-0000-7000-8000-000000000001", "saga": "create-order", "version": "1f2e", "key": "o-1",
            "state": "Compensated", "startedAt": "2026-11-23T10:00:00Z", "endedAt": "2026-11-23T10:00:01Z",
            "failure": {"step": "reserve-credit", "code": "CreditLimitExceeded", "reason": "INSUFFICIENT_CREDIT", "message": "120 > 100"},
            "input": {"orderId": "o-1"}, "output": {"total": 120},
            "history": [
                {"time": "2026-11-23T10:00:00Z", "outcome": "started", "state": "Running"},
                {"time": "2026-11-23T10:00:00.5Z", "step": "reserve-credit", "operation": "do", "attempt": 2, "outcome": "failed",
                 "code": "CreditLimitExceeded", "message": "120 > 100", "state": "Compensating"},
            ],
        }))
        .unwrap();
        insta::assert_snapshot!(history(&detail), @r#"
        Saga:     create-order (version 1f2e)
        Instance: 0192f3a4-0000-7000-8000-000000000001
        State:    Compensated
        Key:      o-1
        Failure:  INSUFFICIENT_CREDIT at reserve-credit: 120 > 100
        Input:    {"orderId":"o-1"}
        Output:   {"total":120}

        TIME                       STEP             OPERATION   OUTCOME              DETAIL
        2026-11-23T10:00:00.000Z                                started
        2026-11-23T10:00:00.500Z   reserve-credit   do          failed (attempt 2)   CreditLimitExceeded: 120 > 100
        "#);
    }
}
