//! `/status` of each pod of ours that has one, over a bounded number of connections.
//!
//! While there are few such pods, each has a stream, which reports a change within a second. When there are more pods than
//! connections they take turns: each is asked once, and again after a pause that grows with their number. So ten thousand
//! pods need no more sockets than a hundred.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    sync::Arc,
    time::Duration,
};

use smol_str::SmolStr;
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::pod_status::{self, SILENCE, StatusError};
use crate::controllers::{
    resources::key::{ObjectId, ObjectKind},
    runtime::{Context, Priority},
};

/// Connections to pods at the same time.
const CONNECTIONS: usize = 128;
/// File descriptors that are kept for everything else: the API server's connections, the admin port, files.
const RESERVED: usize = 96;
/// A pod that could not be reached for so long has no status any more.
const FORGOTTEN: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Between two turns of a pod, as long as there are few enough of them.
const INTERVAL: Duration = Duration::from_secs(5);
/// Turns a second, of all pods together.
const TURNS: f64 = 400.0;
/// Pods come and go in crowds: what is read is compared with what is there so often at most.
const SETTLE: Duration = Duration::from_millis(500);

/// Reads every status until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let http = match pod_status::client() {
        Ok(http) => http,
        Err(error) => {
            tracing::error!(error = %error, "no HTTP client: the data plane's status stays unknown");
            return;
        }
    };
    let connections = connections(open_files());
    let (mut readers, crowded) = (Readers::default(), watch::Sender::new(false));
    let mut reading = JoinSet::new();
    let mut compare = Some(Instant::now());
    loop {
        let due = if reading.len() < connections { readers.next_due() } else { None };
        tokio::select! {
            () = stop.cancelled() => return,
            () = context.on_pods_changed(), if compare.is_none() => compare = Some(Instant::now() + SETTLE),
            () = at(compare) => {
                readers.compare(context.store().admin_addresses(), Instant::now());
                crowded.send_replace(readers.len() > connections);
                compare = None;
            }
            Some(ended) = reading.join_next() => {
                // a reader that was cut off has nothing to report
                if let Ok(ended) = ended
                    && let Some(pod) = readers.ended(ended, *crowded.borrow(), Instant::now(), rand::random())
                {
                    let requeue = context.store().set_status(&pod, None);
                    context.enqueue(requeue, Priority::Event);
                }
            }
            () = at(due) => {}
        }
        while reading.len() < connections
            && let Some((pod, kind, address)) = readers.start(Instant::now())
        {
            let turn = turn(Arc::clone(&context), http.clone(), crowded.subscribe(), pod.clone(), kind, address);
            readers.started(&pod, reading.spawn(turn));
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// How many connections there may be, by the number of files that this process may open.
fn connections(open_files: Option<usize>) -> usize {
    let Some(files) = open_files else { return CONNECTIONS };
    let connections = files.saturating_sub(RESERVED).clamp(1, CONNECTIONS);
    if connections < CONNECTIONS {
        tracing::warn!(
            files,
            connections,
            "this process may open few files (ulimit -n): it reads the status of fewer pods at the same time"
        );
    }
    connections
}

/// The soft limit, as Linux reports it.
fn open_files() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    soft_limit(&limits)
}

fn soft_limit(limits: &str) -> Option<usize> {
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

/// One turn of a pod: its stream, as long as there are connections for all; else its status once.
async fn turn(
    context: Arc<Context>,
    http: reqwest::Client,
    mut crowded: watch::Receiver<bool>,
    pod: ObjectId,
    kind: ObjectKind,
    address: SmolStr,
) -> Ended {
    let (follow, mut heard) = (!*crowded.borrow(), None);
    let read = pod_status::read(&http, &address, kind, follow, |status| {
        heard = Some(Instant::now());
        let requeue = context.store().set_status(&pod, Some(status));
        context.enqueue(requeue, Priority::Event);
    });
    let result = if follow {
        tokio::select! {
            result = read => result,
            _ = crowded.wait_for(|crowded| *crowded) => Ok(()),
        }
    } else {
        read.await
    };
    if let Err(error) = &result {
        tracing::debug!(pod = %pod.name, namespace = %pod.namespace, error = %error, "cannot read a status");
    }
    let silent = matches!(result, Err(StatusError::Silent));
    Ended { pod, address, heard, silent }
}

/// What a turn resulted in.
#[derive(Debug)]
struct Ended {
    pod: ObjectId,
    address: SmolStr,
    /// When the last status came, if any did.
    heard: Option<Instant>,
    /// The connection was there, and nothing came for [`SILENCE`].
    silent: bool,
}

/// The pods with a status, and when each has its next turn.
#[derive(Debug, Default)]
struct Readers {
    readers: HashMap<ObjectId, Reader>,
    due: BTreeSet<(Instant, ObjectId)>,
}

#[derive(Debug)]
struct Reader {
    kind: ObjectKind,
    address: SmolStr,
    turn: Turn,
    pause: Duration,
    /// Since when it cannot be reached.
    unreachable: Option<Instant>,
}

#[derive(Debug)]
enum Turn {
    /// Waits until then.
    Due(Instant),
    Reads(Option<AbortHandle>),
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Turn::Reads(Some(task)) = &self.turn {
            task.abort();
        }
    }
}

impl Readers {
    fn len(&self) -> usize {
        self.readers.len()
    }

    fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Begins with pods that are new or have another address, ends with those that are gone.
    fn compare(&mut self, wanted: BTreeMap<ObjectId, (ObjectKind, SmolStr)>, now: Instant) {
        let gone: Vec<_> = self
            .readers
            .iter()
            .filter(|(pod, reader)| wanted.get(*pod).is_none_or(|(_, address)| *address != reader.address))
            .map(|(pod, _)| pod.clone())
            .collect();
        for pod in gone {
            if let Some(Turn::Due(at)) = self.readers.remove(&pod).as_ref().map(|reader| &reader.turn) {
                self.due.remove(&(*at, pod));
            }
        }
        for (pod, (kind, address)) in wanted {
            self.readers.entry(pod).or_insert_with_key(|pod| {
                self.due.insert((now, pod.clone()));
                Reader { kind, address, turn: Turn::Due(now), pause: FIRST_PAUSE, unreachable: None }
            });
        }
    }

    /// The next pod whose turn has come.
    fn start(&mut self, now: Instant) -> Option<(ObjectId, ObjectKind, SmolStr)> {
        if self.next_due()? > now {
            return None;
        }
        let (_, pod) = self.due.pop_first()?;
        let reader = self.readers.get_mut(&pod)?;
        reader.turn = Turn::Reads(None);
        Some((pod, reader.kind, reader.address.clone()))
    }

    fn started(&mut self, pod: &ObjectId, task: AbortHandle) {
        if let Some(reader) = self.readers.get_mut(pod) {
            reader.turn = Turn::Reads(Some(task));
        }
    }

    /// Plans the pod's next turn. The answer is the pod when its status counts no more. `random`: from 0 to 1.
    fn ended(&mut self, ended: Ended, crowded: bool, now: Instant, random: f64) -> Option<ObjectId> {
        let Ended { pod, address, heard, silent } = ended;
        let interval = self.interval();
        let reader = self.readers.get_mut(&pod).filter(|reader| reader.address == address)?;
        let pause = if heard.is_some() && !silent {
            // a stream that reported, and broke without having fallen silent, was alive until now
            (reader.pause, reader.unreachable) = (FIRST_PAUSE, None);
            if crowded { interval.mul_f64(1.0 - random / 2.0) } else { FIRST_PAUSE }
        } else {
            let since = if silent { now.checked_sub(SILENCE).unwrap_or(now) } else { now };
            reader.unreachable.get_or_insert(since);
            let pause = reader.pause;
            reader.pause = (pause * 2).min(LONGEST_PAUSE);
            pause
        };
        let at = now + pause;
        reader.turn = Turn::Due(at);
        let forgotten = reader.unreachable.is_some_and(|since| now.duration_since(since) > FORGOTTEN);
        self.due.insert((at, pod.clone()));
        forgotten.then_some(pod)
    }

    /// Between two turns of a pod when they take turns.
    fn interval(&self) -> Duration {
        let pods = u32::try_from(self.len()).unwrap_or(u32::MAX);
        Duration::from_secs_f64(f64::from(pods) / TURNS).max(INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(number: usize) -> ObjectId {
        ObjectId::new("shop", format!("orders-{number:05}"))
    }

    fn wanted(count: usize) -> BTreeMap<ObjectId, (ObjectKind, SmolStr)> {
        (0..count).map(|number| (pod(number), (ObjectKind::Microservice, format!("10.0.0.{number}").into()))).collect()
    }

    fn ended(number: usize, heard: bool, silent: bool) -> Ended {
        let heard = heard.then(Instant::now);
        Ended { pod: pod(number), address: format!("10.0.0.{number}").into(), heard, silent }
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_pods_have_their_turns_within_half_a_minute() {
        let (mut readers, mut now) = (Readers::default(), Instant::now());
        readers.compare(wanted(10_000), now);
        let start = now;
        let mut turns = 0_u32;
        while now - start < Duration::from_mins(2) {
            let Some((pod, _, address)) = readers.start(now) else {
                now = readers.next_due().unwrap();
                continue;
            };
            turns += 1;
            readers.ended(Ended { pod, address, heard: Some(now), silent: false }, true, now, 0.5);
        }
        let rounds = f64::from(turns) / 10_000.0;
        assert!((5.0..8.0).contains(&rounds), "{rounds} rounds in two minutes");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_or_moves_is_read_no_longer_under_its_old_address() {
        let (mut readers, now) = (Readers::default(), Instant::now());
        readers.compare(wanted(2), now);
        let first = readers.start(now).unwrap().0;
        let task = tokio::spawn(std::future::pending::<()>());
        readers.started(&first, task.abort_handle());
        let mut moved = wanted(1);
        moved.get_mut(&pod(0)).unwrap().1 = SmolStr::new("10.0.0.9");
        readers.compare(moved, now);
        assert!(task.await.unwrap_err().is_cancelled());
        assert_eq!(readers.ended(ended(0, true, false), false, now, 0.5), None, "of the old address");
        assert_eq!(
            readers.start(now).map(|(pod, _, address)| (pod, address)),
            Some((pod(0), SmolStr::new("10.0.0.9")))
        );
        assert_eq!(readers.start(now), None);
        assert_eq!(readers.next_due(), None, "the other pod is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_cannot_be_reached_has_no_status_after_a_while() {
        let (mut readers, start) = (Readers::default(), Instant::now());
        readers.compare(wanted(1), start);
        let mut now = start;
        let forgotten = loop {
            now = now.max(readers.next_due().unwrap());
            assert!(readers.start(now).is_some());
            if readers.ended(ended(0, false, false), false, now, 0.5).is_some() {
                break now - start;
            }
        };
        assert!(forgotten > FORGOTTEN && forgotten < FORGOTTEN * 2, "{forgotten:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_fell_silent_has_no_status_and_one_that_broke_has() {
        let (mut readers, now) = (Readers::default(), Instant::now() + SILENCE);
        readers.compare(wanted(2), now);
        assert!(readers.start(now).is_some() && readers.start(now).is_some());
        assert_eq!(readers.ended(ended(0, true, true), false, now, 0.5), Some(pod(0)));
        assert_eq!(readers.ended(ended(1, true, false), false, now, 0.5), None);
    }

    #[test]
    fn the_limit_of_open_files_bounds_the_connections() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(limits), Some(1024));
        assert_eq!(connections(Some(1024)), CONNECTIONS);
        assert_eq!(connections(Some(128)), 32);
        assert_eq!(connections(Some(10)), 1);
        assert_eq!(connections(None), CONNECTIONS);
    }
}
