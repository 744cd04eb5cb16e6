//! What waits for the set-up: the pod template of the owner's Deployment, and nothing else.
//!
//! While a set-up is not done, the Deployment is written with the template that was released last, so that replicas go on
//! being scaled, and one that was deleted is made again. That template is kept in the set-up's ConfigMap,
//! where it outlives the Deployment and this process. (ReplicaSets go with their Deployment, and ControllerRevisions
//! would need a right and a watch of their own.) Where the ConfigMap was deleted, it is read from the Deployment. It is written
//! whole: a field that is left out of a server-side apply is given up.

use k8s_openapi::api::apps::v1::Deployment;

use crate::controllers::resources::observed::{DatabaseObserved, Released};

/// What passes the gate.
#[derive(Debug)]
pub(super) struct Passed {
    /// `None` while no template was ever released.
    pub deployment: Option<Deployment>,
    /// The template that the Deployment has, to be kept.
    pub released: Option<Released>,
    /// The set-up is done, and a new template waits all the same, for a change of the migrations that may follow its spec.
    pub settles: bool,
}

pub(super) fn pass(mut deployment: Deployment, is_done: bool, observed: &DatabaseObserved) -> Passed {
    let new = template_of(&deployment);
    let last = observed.released.as_deref();
    let settles = is_done && observed.settles_in.is_some() && last != Some(&new);
    if is_done && !settles {
        return Passed { deployment: Some(deployment), released: Some(new), settles };
    }
    let deployment = last.map(|last| {
        deployment.metadata.annotations = Some(last.annotations.clone());
        deployment.spec.get_or_insert_default().template = last.template.clone();
        deployment
    });
    Passed { deployment, released: last.cloned(), settles }
}

fn template_of(deployment: &Deployment) -> Released {
    Released {
        annotations: deployment.metadata.annotations.clone().unwrap_or_default(),
        template: deployment.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default(),
    }
}
