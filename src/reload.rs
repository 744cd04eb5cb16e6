//! A program follows its contract file: a change comes without a restart, and an invalid one leaves the last valid one in force.

use std::{path::Path, time::Duration};

use tokio::{sync::watch, time::sleep};

use crate::contract::{Contract, ContractError};

/// How often the contract file is read again.
const RELOAD: Duration = Duration::from_secs(1);

/// Follows changes of the contract file, forever. One that is not `usable` yet is passed over; `report` gets what is wrong with the
/// file, or `None` when nothing is.
pub async fn follow<C: Contract + PartialEq + Send + 'static>(
    path: &Path,
    contracts: &watch::Sender<C>,
    usable: impl Fn(&C) -> bool,
    report: impl Fn(Option<&ContractError>),
) {
    loop {
        sleep(RELOAD).await;
        let file = path.to_owned();
        match tokio::task::spawn_blocking(move || C::load(&file)).await {
            Ok(Ok(contract)) if !usable(&contract) => {}
            Ok(Ok(contract)) => {
                report(None);
                let changed = contracts.send_if_modified(|current| {
                    let changed = *current != contract;
                    *current = contract;
                    changed
                });
                if changed {
                    tracing::info!(path = %path.display(), "the contract changed");
                }
            }
            Ok(Err(error)) => report(Some(&error)),
            Err(_cancelled) => return,
        }
    }
}
