//! Killing at random, by a seed that is printed.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};

use tokio_util::sync::CancellationToken;

use super::{Scenario, objects::is_ready, progress, shell};

/// `$WEFT_SEED`, or a new one.
pub fn seed() -> u64 {
    std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| rand::random::<u64>() >> 32)
}

/// So many deaths, then peace: on a slow machine, work that is killed at the same pace would never end.
const MOST: u32 = 18;

/// Pods that may be killed, by a label selector.
#[derive(Clone, Debug)]
pub struct Victim {
    pub labels: String,
    /// The container whose process is killed.
    pub container: &'static str,
    pub kill: Kill,
}

/// How a victim dies. A process dies by SIGKILL, from outside the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kill {
    /// The process dies, or the pod is deleted by force.
    ProcessOrPod,
    /// The process dies; half of the time the pod is deleted right after, and its successor starts when it has ended. Not by
    /// force: the kubelet may have started the process again, and two NATS would then write to one volume, on which it has
    /// no lock.
    ProcessThenPod,
}

impl Victim {
    pub fn new(owner: &str, component: &str, container: &'static str, kill: Kill) -> Self {
        let labels = format!("app.kubernetes.io/instance={owner},app.kubernetes.io/component={component}");
        Self { labels, container, kill }
    }
}

impl Scenario {
    /// Kills one of `victims` after another until `work` is done, and gives what `work` gave: each of them once at the pace
    /// of `respite` (half of it to one and a half), then any, when most times all are ready again before. The last death may
    /// be but a moment ago. Fails when the work was done before each of them had died.
    pub async fn while_killing<T>(
        &self,
        victims: &[Victim],
        respite: Duration,
        seed: u64,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        progress(&format!("{}: killing by WEFT_SEED={seed}", self.name));
        let mut deaths = vec![0_u32; victims.len()];
        let done = CancellationToken::new();
        let killing = async {
            let mut random = StdRng::seed_from_u64(seed);
            let mut next: Vec<usize> = (0..victims.len()).collect();
            next.shuffle(&mut random);
            while deaths.iter().sum::<u32>() < MOST {
                let patient = next.is_empty() && random.random_ratio(3, 4);
                let respite = respite.mul_f64(random.random_range(0.5..1.5));
                let pause = async {
                    if patient {
                        self.all_are_ready(victims).await?;
                    }
                    tokio::time::sleep(respite).await;
                    anyhow::Ok(())
                };
                // a kill that is under way is not cut off, lest it comes after the work's end
                tokio::select! { () = done.cancelled() => break, paused = pause => paused? }
                let chosen = next.last().copied().unwrap_or_else(|| random.random_range(0..victims.len()));
                let (Some(victim), Some(deaths)) = (victims.get(chosen), deaths.get_mut(chosen)) else {
                    bail!("nobody to kill");
                };
                match self.kill(victim, &mut random).await {
                    Ok(true) => {
                        *deaths += 1;
                        next.pop();
                    }
                    Ok(false) => {}
                    Err(error) => progress(&format!("{}: could not kill {}: {error:#}", self.name, victim.labels)),
                }
            }
            Ok(())
        };
        let working = async {
            let worked = work.await?;
            done.cancel();
            Ok(worked)
        };
        let worked = tokio::try_join!(working, killing).map(|(worked, ())| worked);
        for (victim, deaths) in victims.iter().zip(&deaths) {
            progress(&format!("{}: {deaths} times {} of {}", self.name, victim.container, victim.labels));
        }
        let worked = worked.with_context(|| format!("repeat it with WEFT_SEED={seed}"))?;
        ensure!(!deaths.contains(&0), "the work was done before each of them had died: {deaths:?}");
        Ok(worked)
    }

    async fn all_are_ready(&self, victims: &[Victim]) -> Result<()> {
        for victim in victims {
            let labels = &victim.labels;
            self.until(&format!("a pod of {labels} is ready again"), Duration::from_mins(3), async || {
                let pods = self.api::<Pod>().list(&ListParams::default().labels(labels)).await?;
                let there = pods.iter().any(|pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod));
                Ok(there.then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Kills one of the victim's pods; false when there was none, or nothing ran in it.
    async fn kill(&self, victim: &Victim, random: &mut StdRng) -> Result<bool> {
        let (by_process, also_pod): (bool, bool) = (random.random(), random.random());
        let mut pods = self.api::<Pod>().list(&ListParams::default().labels(&victim.labels)).await?.items;
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        let Some(pod) = pods.choose(random) else { return Ok(false) };
        // the kubelet waits ever longer before it starts a container again: a new pod has no past
        let weary = restarts(pod, victim.container) >= 2;
        let (process, delete) = match victim.kill {
            Kill::ProcessOrPod => (by_process && !weary, !by_process || weary),
            Kill::ProcessThenPod => (true, also_pod || weary),
        };
        let mut killed = false;
        if process {
            killed = signal(pod, victim.container, "SIGKILL").await?;
        }
        if delete {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            match victim.kill {
                Kill::ProcessOrPod => self.delete_by_force(name).await?,
                Kill::ProcessThenPod => drop(self.api::<Pod>().delete(name, &DeleteParams::default()).await?),
            }
            killed = true;
        }
        Ok(killed)
    }

    /// From one moment to the next an operator does nothing more, and its pod does not start another one.
    pub async fn kill_operator(&self, pod: &str) -> Result<()> {
        let object = self.api::<Pod>().get(pod).await?;
        ensure!(signal(&object, "operator", "SIGSTOP").await?, "no operator runs in {pod}");
        self.delete_by_force(pod).await?;
        // the kubelet may have been faster
        let _ = signal(&object, "operator", "SIGKILL").await;
        Ok(())
    }

    pub async fn delete_by_force(&self, pod: &str) -> Result<()> {
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.api::<Pod>().delete(pod, &at_once).await?;
        Ok(())
    }
}

/// From outside: inside, the first process of a container is immune against its own kind. False when it does not run.
async fn signal(pod: &Pod, container: &str, signal: &str) -> Result<bool> {
    let Some(id) = container_id(pod, container) else { return Ok(false) };
    shell::cluster(&["exec-node", "ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", signal, &id]).await?;
    Ok(true)
}

fn restarts(pod: &Pod, container: &str) -> i32 {
    statuses(pod).find(|status| status.name == container).map_or(0, |status| status.restart_count)
}

/// Of the running container, without the `containerd://`.
fn container_id(pod: &Pod, container: &str) -> Option<String> {
    let status = statuses(pod).find(|status| status.name == container)?;
    status.state.as_ref()?.running.as_ref()?;
    status.container_id.as_deref()?.split("//").nth(1).map(str::to_owned)
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &k8s_openapi::api::core::v1::ContainerStatus> {
    let status = pod.status.as_ref();
    let main = status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let sidecars = status.and_then(|status| status.init_container_statuses.as_deref()).unwrap_or_default();
    main.iter().chain(sidecars)
}
