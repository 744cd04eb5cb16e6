//! Shutdown: `SIGTERM` or `SIGINT` cancels a token that every task waits for.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancelled when the process is to shut down.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// Listens for `SIGTERM` and `SIGINT`. Must be called inside a runtime.
    pub fn on_signal() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let token = shutdown.0.clone();
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {} _ = int.recv() => {} }
            tracing::info!("received a signal to shut down");
            token.cancel();
        });
        Ok(shutdown)
    }

    /// Resolves when the process is to shut down.
    pub async fn requested(&self) {
        self.0.cancelled().await;
    }

    pub fn is_requested(&self) -> bool {
        self.0.is_cancelled()
    }

    /// The token itself, for tasks that end with the process or earlier (`child_token`).
    pub fn token(&self) -> &CancellationToken {
        &self.0
    }
}
