//! With nothing changing, the operator sends no request but watches and its lease.

use std::time::Duration;

use anyhow::ensure;
use jiff::Timestamp;

use crate::harness::{Company, Request, scenario};

/// How long it has to be silent; how long it must have been before, longer than a number may wait to be written; and how
/// long it may take until it has been.
const SILENCE: Duration = Duration::from_mins(1);
const QUIET: Duration = Duration::from_secs(15);
const SETTLING: Duration = Duration::from_secs(50);

#[tokio::test]
async fn silent_when_converged() {
    scenario("silent_when_converged", Company::Others, async |world| {
        world.install_one_of_each().await?;

        let converged = Timestamp::now();
        let begun = world
            .until("the operator has been silent for some time", SETTLING, async || {
                let last = loud(world.requests_since(converged).await?).pop().map_or(converged, |request| request.at);
                Ok((Timestamp::now().duration_since(last) >= QUIET.try_into()?).then(Timestamp::now))
            })
            .await?;
        tokio::time::sleep(SILENCE).await; // not for something to happen, but for nothing to
        let requests = world.requests_since(begun).await?;
        ensure!(
            requests.iter().any(|request| request.resource == "leases"),
            "the audit log has no request of the operator"
        );
        let loud: Vec<String> =
            loud(requests).iter().map(|request| format!("{} {}", request.verb, request.uri)).collect();
        ensure!(loud.is_empty(), "{} requests in {} s of silence: {loud:#?}", loud.len(), SILENCE.as_secs());
        Ok(())
    })
    .await;
}

fn loud(requests: Vec<Request>) -> Vec<Request> {
    requests.into_iter().filter(|request| request.verb != "watch" && request.resource != "leases").collect()
}
