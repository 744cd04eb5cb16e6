//! Writes Kubernetes Events: by a task of its own, never waited for.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::controllers::status::events::Notice;

/// Events that wait to be written; more are dropped, for the conditions hold the same.
const CAPACITY: usize = 256;
/// Events after which it is forgotten what was written: until then, the same one again is counted, and not written anew.
const REMEMBERED: usize = 256;
const DEADLINE: Duration = Duration::from_secs(10);
/// The API's limit, in bytes.
const MAX_NOTE: usize = 1024;
const CONTROLLER: &str = "weft";

/// Where Events are handed in.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<(Notice, ObjectReference)>);

impl Events {
    /// The writing end, and the task that does the writing until `stop`.
    pub fn new(client: Client, instance: String, stop: CancellationToken) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(instance) };
        let recorder = move || Recorder::new(client.clone(), reporter.clone());
        (Self(sender), write(recorder, receiver, stop))
    }

    pub fn publish(&self, notice: Notice, about: ObjectReference) {
        if self.0.try_send((notice, about)).is_err() {
            tracing::debug!("too many events wait: one is dropped");
        }
    }
}

async fn write(
    new_recorder: impl Fn() -> Recorder,
    mut notices: mpsc::Receiver<(Notice, ObjectReference)>,
    stop: CancellationToken,
) {
    let (mut recorder, mut written) = (new_recorder(), 0);
    loop {
        if written == REMEMBERED {
            (recorder, written) = (new_recorder(), 0);
        }
        written += 1;
        let next = tokio::select! { () = stop.cancelled() => None, next = notices.recv() => next };
        let Some((Notice { warning, reason, message, related }, about)) = next else { return };
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.as_str().to_owned(),
            note: Some(shortened(message)),
            action: "Reconcile".to_owned(),
            secondary: related,
        };
        match tokio::time::timeout(DEADLINE, recorder.publish(&event, &about)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error = %error, reason = event.reason, "an event was not written"),
            Err(_) => tracing::debug!(reason = event.reason, "an event was not written in time"),
        }
    }
}

fn shortened(mut message: String) -> String {
    let mut end = message.len().min(MAX_NOTE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message.truncate(end);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert!(shortened("é".repeat(2000)).len() <= MAX_NOTE);
    }
}
