//! `--watch`: what has changed since, each second.

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use anyhow::Context;
use reqwest::{Method, Url};

use super::{NOT_OURS, form, request};
use crate::{
    output::{self, Format},
    saga::view::{Detail, View},
};

const PAUSE: Duration = Duration::from_secs(1);

/// Prints the instances, and then each one that has changed or come. Ends when nobody reads.
pub(super) async fn list(url: &Url, limit: usize, form: Format) -> anyhow::Result<()> {
    // as they were a second ago
    let mut seen = HashMap::new();
    let mut is_first = true;
    loop {
        let (mut changed, mut now) = (Vec::new(), HashMap::new());
        for view in super::list(url, limit).await?.items {
            let text = serde_json::to_string(&view).context("writing JSON")?;
            now.insert(view.id, text.clone());
            if seen.get(&view.id) != Some(&text) {
                changed.push((view, text));
            }
        }
        seen = now;
        let text = match form {
            Format::Json => changed.into_iter().map(|(_, text)| text + "\n").collect(),
            Format::Table => {
                let views: Vec<View> = changed.into_iter().map(|(view, _)| view).collect();
                let table = form::table(&views);
                let without_head = || table.split_once('\n').map_or("", |(_, rows)| rows).to_owned();
                if is_first { table } else { without_head() }
            }
        };
        is_first = false;
        if !output::written(&text).context("writing the answer")? {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Prints the instance with its history, and then what happens until it ends.
pub(super) async fn show(url: &Url, form: Format) -> anyhow::Result<()> {
    let (mut url, mut shown) = (url.clone(), 0);
    loop {
        let text = request(Method::GET, url.clone(), None).await?;
        let detail: Detail = serde_json::from_str(&text).context(NOT_OURS)?;
        // by its id from now on: another instance may get the same key
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop().push(&detail.view.id.to_string());
        }
        let fresh = detail.history.get(shown..).unwrap_or_default();
        let mut text = match form {
            Format::Json => {
                fresh.iter().map(|one| Ok(serde_json::to_string(one)? + "\n")).collect::<anyhow::Result<_>>()?
            }
            Format::Table if shown == 0 => form::history(&detail),
            Format::Table => form::transitions(fresh),
        };
        let has_ended = detail.view.ended_at.is_some();
        if has_ended && shown > 0 && form == Format::Table {
            let _ = writeln!(text, "State:    {}", form::state(&detail.view));
        }
        shown = detail.history.len();
        if !output::written(&text).context("writing the answer")? || has_ended {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}
