//! Looking into databases and pods, past everything that guards them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Scenario, shell};

impl Scenario {
    /// Rows that `sql` gives in the database of `owner`, fields by `|`; as superuser, in the server's own pod.
    pub async fn psql(&self, owner: &str, sql: &str) -> Result<Vec<String>> {
        let pod = self.ready_pod(owner, "database").await?;
        let database = weft::domain::names::database_name(owner);
        let command = ["psql", "-U", "postgres", "-d", &database, "-AtqX", "-v", "ON_ERROR_STOP=1", "-c", sql];
        let rows = self.exec(&pod, &command).await.with_context(|| format!("asking the database of {owner}: {sql}"))?;
        Ok(rows.lines().map(str::to_owned).collect())
    }

    /// Runs a command in a pod's first container.
    pub async fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        shell::kubectl(&[&["exec", "--namespace", &self.namespace, pod, "--"], command].concat()).await
    }

    /// Runs `weft-e2e` in a pod of the service, as that service.
    pub async fn in_service(&self, service: &str, args: &[&str]) -> Result<String> {
        let pod = self.ready_pod(service, "service").await?;
        let said = self.exec(&pod, &[&["/usr/bin/weft-e2e"], args].concat()).await?;
        Ok(said.trim().to_owned())
    }

    /// As [`Scenario::in_service`], until it says `wanted`: a new pod's address has to reach the network policies first.
    pub async fn service_says(&self, service: &str, args: &[&str], wanted: &str) -> Result<()> {
        self.until(&format!("{service} says {wanted} to {args:?}"), Duration::from_secs(20), async || {
            let said = self.in_service(service, args).await?;
            ensure!(said == wanted, "it says: {said}");
            Ok(Some(()))
        })
        .await
    }
}
