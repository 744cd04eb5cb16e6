//! The end of a Saga: its orchestrator starts nothing more, and the finalizer keeps the Saga, and with it the orchestrator, until
//! the instances have ended.

use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    core::DeserializeGuard,
};
use serde_json::{Value, json};

use super::{Defined, Observed};
use crate::{
    api::v1alpha1::Saga,
    controllers::{
        request::{RequestError, within_deadline},
        resources::{
            key::Key,
            labels::{DRAIN_FINALIZER, FINALIZER_MANAGER, FORCE_DELETE_ANNOTATION, has_drain_finalizer},
            plan::Rejection,
            reason::Reason,
        },
        runtime::{Context, Priority},
        status::progress::Finding,
    },
};

/// What is to be done about the finalizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Add,
    Remove,
}

/// The Saga is deleted, and waits for its instances.
pub fn is_draining(object: &Saga) -> bool {
    object.metadata.deletion_timestamp.is_some() && has_drain_finalizer(object)
}

/// What a Saga that is being deleted waits for; `None` when nothing keeps it.
pub fn waits_for(object: &Saga, observed: &Observed, planned: &Result<Defined, Rejection>) -> Option<Finding> {
    let waiting = |reason: Reason, message: String| Some(Finding::new(true, reason, message));
    let is_forced = object.annotations().get(FORCE_DELETE_ANNOTATION).is_some_and(|value| value == "true");
    let may_not_write = planned.as_ref().is_err_and(|rejection| rejection.reason == Reason::NamespaceNotEnabled);
    let orchestrator = &observed.orchestrator;
    let exists = orchestrator.deployment.is_some() || orchestrator.database.server.is_some();
    let pass = observed.orchestrator_pass.as_ref();
    let namespace_ends = pass
        .is_some_and(|pass| pass.applied.failures.iter().any(|failure| failure.reason == Reason::NamespaceTerminating));
    if is_forced || may_not_write || namespace_ends || (!exists && pass.is_some()) {
        return None;
    }
    let Some(status) = &orchestrator.status else {
        return waiting(
            Reason::OrchestratorSilent,
            format!("the orchestrator does not report how many instances are left; {WAY_OUT}"),
        );
    };
    if !status.ready {
        return match status.problems.first() {
            Some(problem) => waiting(problem.reason.into(), format!("{}; {WAY_OUT}", problem.message)),
            None => waiting(Reason::Starting, "the orchestrator is recovering its instances".to_owned()),
        };
    }
    match status.sagas.get(&object.name_any()).filter(|counts| counts.draining) {
        None => waiting(Reason::Draining, "the orchestrator is about to refuse new instances".to_owned()),
        Some(counts) if counts.running > 0 => {
            let stuck = if counts.stuck > 0 { format!(", {} of them stuck", counts.stuck) } else { String::new() };
            let left = if counts.running == 1 {
                "1 instance is".to_owned()
            } else {
                format!("{} instances are", counts.running)
            };
            waiting(Reason::Draining, format!("{left} left{stuck}, and no new one starts; {WAY_OUT}"))
        }
        Some(_) => None,
    }
}

const WAY_OUT: &str = "to give them up where they are, annotate the Saga with weft.dev/force-delete=true";

/// How the finalizer is to change. A Saga that was never accepted has no instances, so it gets none.
pub fn change(object: &Saga, observed: &Observed, planned: &Result<Defined, Rejection>) -> Option<Change> {
    match (object.metadata.deletion_timestamp.is_some(), has_drain_finalizer(object)) {
        // one that is only watched goes at once
        (false, false) if planned.as_ref().is_ok_and(|defined| defined.definition().is_some()) => Some(Change::Add),
        (true, true) if waits_for(object, observed, planned).is_none() => Some(Change::Remove),
        _ => None,
    }
}

/// Removes the finalizer from the Sagas of these namespaces (of all, if none is given): for after the operator's end, when nobody
/// else would. Those of a namespace that may not be read stay.
pub async fn release_all(client: &Client, namespaces: &[String]) -> anyhow::Result<()> {
    let apis = match namespaces {
        [] => vec![Api::<Saga>::all(client.clone())],
        some => some.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect(),
    };
    for api in apis {
        let sagas = match within_deadline(api.list_metadata(&ListParams::default())).await {
            Ok(sagas) => sagas.items,
            // the namespace, or the definition of Sagas, is gone
            Err(error) if matches!(error.code(), Some(403 | 404)) => continue,
            Err(error) => return Err(anyhow::anyhow!("the Sagas cannot be listed: {}", error.message())),
        };
        for saga in sagas.iter().filter(|saga| has_drain_finalizer(*saga)) {
            let (name, namespace) = (saga.name_any(), saga.namespace().unwrap_or_default());
            let api: Api<Saga> = Api::namespaced(client.clone(), &namespace);
            let change = applied(&name, saga.metadata.uid.as_deref(), Change::Remove);
            let params = PatchParams::apply(FINALIZER_MANAGER).force();
            match within_deadline(api.patch_metadata(&name, &params, &Patch::Apply(&change))).await {
                Ok(_) => tracing::info!(namespace, name, "the Saga may be deleted without an operator"),
                Err(error) if error.code() == Some(404) => {}
                Err(error) => {
                    return Err(anyhow::anyhow!("Saga {namespace}/{name} keeps its finalizer: {}", error.message()));
                }
            }
        }
    }
    Ok(())
}

fn applied(name: &str, uid: Option<&str>, change: Change) -> Value {
    let finalizers = match change {
        Change::Add => vec![DRAIN_FINALIZER],
        Change::Remove => Vec::new(),
    };
    json!({
        "apiVersion": Saga::api_version(&()),
        "kind": Saga::kind(&()),
        "metadata": {"name": name, "uid": uid, "finalizers": finalizers},
    })
}

/// Writes the change by a field manager of its own, so that other finalizers stay.
pub async fn write(context: &Context, key: &Key, object: &Saga, change: Change) -> Result<(), RequestError> {
    let body = applied(&key.id.name, object.metadata.uid.as_deref(), change);
    let api: Api<DeserializeGuard<Saga>> = Api::namespaced(context.client.clone(), &key.id.namespace);
    let params = PatchParams::apply(FINALIZER_MANAGER).force();
    let answer = match within_deadline(api.patch(&key.id.name, &params, &Patch::Apply(&body))).await {
        // it is gone
        Err(error) if error.code() == Some(404) => return Ok(()),
        answer => answer?,
    };
    if let Ok(object) = answer.0 {
        let requeue = context.store().set(object);
        context.enqueue(requeue, Priority::Event);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::{
        contract::status::{OrchestratorStatus, SagaCounts},
        controllers::{
            fixtures::{self, microservice, ready, saga},
            kinds::saga::plan::define,
            resources::{
                child::{ChildKind, ChildRef},
                outcome::{Applied, Failure},
            },
            runtime::PassResult,
        },
    };

    const SPEC: &str = "{steps: [{name: act, do: {service: orders, command: Act}, undo: {none: true}}]}";

    /// A Saga that is being deleted, of an orchestrator that refuses starts and runs `running` instances.
    fn deleted(running: u64) -> (Saga, Observed) {
        let mut object = saga("create-order", SPEC);
        object.metadata.finalizers = Some(vec![DRAIN_FINALIZER.to_owned()]);
        object.metadata.deletion_timestamp = Some(Time(fixtures::now()));
        let orders = "{image: i, ports: [{name: http, port: 80}], commands: {Act: {http: {path: /act}}}}";
        let mut observed = Observed {
            services: [("orders".to_owned(), Arc::new(microservice("orders", orders)))].into(),
            orchestrator_pass: Some(PassResult::default()),
            ..Observed::default()
        };
        observed.orchestrator.deployment = Some(ready(1));
        observed.orchestrator.database.server = Some(ready(1));
        let counts = SagaCounts { draining: true, running, ..SagaCounts::default() };
        observed.orchestrator.status = Some(OrchestratorStatus {
            ready: true,
            sagas: [("create-order".to_owned(), counts)].into(),
            ..OrchestratorStatus::default()
        });
        (object, observed)
    }

    fn waits(object: &Saga, observed: &Observed) -> Option<Finding> {
        let planned = define(object, observed);
        let waits = waits_for(object, observed, &planned);
        assert_eq!(change(object, observed, &planned) == Some(Change::Remove), waits.is_none());
        waits
    }

    #[test]
    fn an_accepted_saga_gets_the_finalizer_and_one_that_never_was_does_not() {
        let (mut object, observed) = deleted(0);
        object.metadata.deletion_timestamp = None;
        assert_eq!(change(&object, &observed, &define(&object, &observed)), None);
        object.metadata.finalizers = None;
        assert_eq!(change(&object, &observed, &define(&object, &observed)), Some(Change::Add));
        object.spec.steps[0].task.action.as_mut().unwrap().command = "Akt".to_owned();
        assert_eq!(change(&object, &observed, &define(&object, &observed)), None);
    }

    #[test]
    fn a_deleted_saga_waits_for_its_instances() {
        let (object, mut observed) = deleted(2);
        let finding = waits(&object, &observed).unwrap();
        assert_eq!(finding.reason, Reason::Draining);
        assert!(finding.message.starts_with("2 instances are left, and no new one starts"), "{}", finding.message);
        assert_eq!(waits(&deleted(0).0, &deleted(0).1), None);
        // another orchestrator may have started one since
        let status = observed.orchestrator.status.as_mut().unwrap();
        let counts = status.sagas.get_mut("create-order").unwrap();
        (counts.running, counts.draining) = (0, false);
        assert_eq!(waits(&object, &observed).unwrap().reason, Reason::Draining);
        observed.orchestrator.status.as_mut().unwrap().ready = false;
        assert_eq!(waits(&object, &observed).unwrap().reason, Reason::Starting);
        observed.orchestrator.status = None;
        assert_eq!(waits(&object, &observed).unwrap().reason, Reason::OrchestratorSilent);
    }

    #[test]
    fn nothing_keeps_a_saga_that_is_forced_or_whose_namespace_ends() {
        let (mut object, mut observed) = deleted(2);
        let child = ChildRef::new(ChildKind::Deployment, "default-orchestrator");
        let failure = Failure { child, reason: Reason::NamespaceTerminating, message: String::new() };
        let applied = Applied { failures: vec![failure], ..Applied::default() };
        observed.orchestrator_pass = Some(PassResult { applied, ..PassResult::default() });
        assert_eq!(waits(&object, &observed), None);
        observed.orchestrator_pass = Some(PassResult::default());
        assert!(waits(&object, &observed).is_some());
        object.metadata.annotations = Some([(FORCE_DELETE_ANNOTATION.to_owned(), "true".to_owned())].into());
        assert_eq!(waits(&object, &observed), None);
    }

    #[test]
    fn nothing_keeps_a_saga_without_an_orchestrator_or_where_the_operator_may_not_write() {
        let (object, mut observed) = deleted(2);
        let rejection = Rejection { reason: Reason::NamespaceNotEnabled, message: String::new() };
        assert_eq!(waits_for(&object, &observed, &Err(rejection)), None);
        observed.orchestrator.deployment = None;
        observed.orchestrator.database.server = None;
        observed.orchestrator.status = None;
        assert_eq!(waits(&object, &observed), None);
        // before the first pass nothing is known
        observed.orchestrator_pass = None;
        assert!(waits(&object, &observed).is_some());
    }
}
