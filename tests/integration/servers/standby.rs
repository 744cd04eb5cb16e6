//! A standby of a PostgreSQL server: a copy that replays its log as it comes, until it is promoted.

use super::{Postgres, files::accessible_folder, free_port};

impl Postgres {
    /// Makes and starts a standby that is called `name` (in `synchronous_standby_names`) and reads the log from `port`,
    /// which is this server's own or that of a proxy before it. Returns when it answers queries.
    pub fn standby(&self, name: &str, port: u16) -> Self {
        let home = accessible_folder("weft-postgres-", self.installation.user.as_ref());
        let data = home.path().join("data");
        let mut copy = self.tool("pg_basebackup");
        // of one option given twice the last counts
        copy.arg(format!("--port={port}")).arg("--pgdata").arg(&data);
        copy.args(["--checkpoint=fast", "--wal-method=stream", "--no-sync", "--write-recovery-conf"]);
        let output = copy.output().expect("pg_basebackup is started");
        assert!(output.status.success(), "pg_basebackup failed: {}", String::from_utf8_lossy(&output.stderr));
        let mut parameters = self.parameters.clone();
        // what the standby calls itself to its primary
        parameters.push(format!("cluster_name={name}"));
        let installation = self.installation.clone();
        let mut server = Self { installation, home, parameters, port: free_port(), process: None };
        server.restart();
        server
    }

    /// Ends the recovery of a standby: it becomes a primary on a new timeline.
    pub async fn promote(&self) {
        let promoted = self.superuser("postgres").await.query_one("select pg_promote(true, 60)", &[]).await;
        assert!(promoted.expect("the standby is promoted").get::<_, bool>(0), "the promotion has ended");
    }

    /// Lets commits wait for these standbys (`''`: for none), as `synchronous_standby_names` has them. With the name of one
    /// that does not exist a commit is in the log and nobody sees its rows, until the setting changes.
    pub async fn set_synchronous_standbys(&self, names: &str) {
        let superuser = self.superuser("postgres").await;
        let set = format!("alter system set synchronous_standby_names = '{names}'");
        superuser.batch_execute(&set).await.expect("the setting is written");
        superuser.batch_execute("select pg_reload_conf()").await.expect("the setting is read");
        // the checkpointer publishes it to the backends
        let waits = format!("select current_setting('synchronous_standby_names') = '{names}'");
        super::until("the setting is in force", async || {
            let row = superuser.query_one(&waits, &[]).await;
            row.is_ok_and(|row| row.get(0))
        })
        .await;
    }
}

#[tokio::test]
async fn a_standby_has_what_its_primary_committed_and_writes_once_it_is_promoted() {
    let mut primary = Postgres::start();
    let standby = primary.standby("other", primary.port());
    primary.set_synchronous_standbys("other").await;
    let client = primary.superuser("postgres").await;
    client
        .batch_execute("set synchronous_commit = remote_apply; create table kept (n int); insert into kept values (7)")
        .await
        .unwrap();
    primary.kill9();
    standby.promote().await;
    let client = standby.superuser("postgres").await;
    client.batch_execute("set synchronous_commit = local; insert into kept values (8)").await.unwrap();
    assert_eq!(client.query_one("select sum(n) from kept", &[]).await.unwrap().get::<_, i64>(0), 15);
}
