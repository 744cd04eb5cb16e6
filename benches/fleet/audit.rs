//! What the operator asked of the API server, by the server's own account.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use serde::Deserialize;

/// An entry is written a moment after its answer.
const LATE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct Audit {
    log: PathBuf,
    read: u64,
}

/// What was asked between two moments: lists, watches and the lease left out.
#[derive(Debug, Default)]
pub struct Requests(BTreeMap<String, u64>);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    verb: String,
    #[serde(rename = "requestURI")]
    uri: String,
    object_ref: Option<Object>,
    response_status: Option<Answer>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Object {
    resource: String,
    subresource: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Answer {
    code: u16,
}

impl Audit {
    pub fn new(log: PathBuf) -> Self {
        Self { log, read: 0 }
    }

    /// What came since the last call.
    pub async fn since(&mut self) -> Requests {
        tokio::time::sleep(LATE).await;
        let mut file = BufReader::new(File::open(&self.log).unwrap());
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let (mut requests, mut line) = (Requests::default(), String::new());
        loop {
            line.clear();
            let length = file.read_line(&mut line).unwrap();
            if length == 0 || !line.ends_with('\n') {
                return requests;
            }
            self.read += length as u64;
            requests.count(&serde_json::from_str(&line).unwrap());
        }
    }
}

impl Requests {
    fn count(&mut self, entry: &Entry) {
        let Some(object) = &entry.object_ref else { return };
        if matches!(entry.verb.as_str(), "list" | "watch") || object.resource == "leases" {
            return;
        }
        let code = entry.response_status.as_ref().map_or(0, |answer| answer.code);
        let slash = if object.subresource.is_empty() { "" } else { "/" };
        let dry = if entry.uri.contains("dryRun") { " (dry run)" } else { "" };
        let failed = if code >= 400 { format!(" → {code}") } else { String::new() };
        let what = format!("{} {}{slash}{}{dry}{failed}", entry.verb, object.resource, object.subresource);
        *self.0.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, more: Self) {
        for (what, count) in more.0 {
            *self.0.entry(what).or_default() += count;
        }
    }

    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Writes of custom resources' statuses.
    pub fn statuses(&self) -> u64 {
        self.0.iter().filter(|(what, _)| what.contains("/status")).map(|(_, count)| count).sum()
    }

    /// Each kind of request with how often it was sent for each of `objects`, the frequent ones first.
    pub fn print(&self, objects: usize) {
        let mut kinds: Vec<_> = self.0.iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (what, count) in kinds.into_iter().filter(|(_, count)| **count * 100 >= objects as u64) {
            println!("      {:6.2}  {what}", *count as f64 / objects as f64);
        }
    }
}
