//! What every pod that Weft makes has in common: it passes Pod Security `restricted`, and it keeps what it got from the operator's
//! configuration until it changes for another reason.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec},
        core::v1::{
            Capabilities, ConfigMapVolumeSource, KeyToPath, LocalObjectReference, PodSecurityContext, PodSpec,
            PodTemplateSpec, SeccompProfile, SecretVolumeSource, SecurityContext, ServiceAccount, Volume, VolumeMount,
        },
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    controllers::resources::{
        labels::{DEFAULTS_ANNOTATION, TEMPLATE_HASH_ANNOTATION, UPGRADE_ANNOTATION},
        observed::{Workload, is_about_resources},
        settings::{Defaults, Settings},
    },
    domain::version,
};

/// User and group of Weft's own containers, as in its image.
pub const WEFT_USER: i64 = 65532;

/// A pod's security context under Pod Security `restricted`; the user comes from the image.
pub fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
        ..PodSecurityContext::default()
    }
}

/// A pod's spec as far as all pods have it: under its ServiceAccount, without a token and without other Services' variables.
pub fn pod_spec(service_account: String) -> PodSpec {
    PodSpec {
        service_account_name: Some(service_account),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security()),
        ..PodSpec::default()
    }
}

/// A Deployment of one pod.
pub fn single(metadata: ObjectMeta, selector: LabelSelector, pinned: Pinned) -> Deployment {
    Deployment {
        metadata: ObjectMeta { annotations: Some(pinned.annotations), ..metadata },
        spec: Some(DeploymentSpec {
            replicas: Some(1),
            selector,
            template: pinned.template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// A container's security context under Pod Security `restricted`.
pub fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

/// The same for one of Weft's own programs, which write no files.
pub fn weft_security(settings: &Settings) -> SecurityContext {
    let user = settings.fixed_user_ids.then_some(WEFT_USER);
    SecurityContext {
        run_as_user: user,
        run_as_group: user,
        run_as_non_root: Some(true),
        read_only_root_filesystem: Some(true),
        ..container_security()
    }
}

/// A ServiceAccount without rights and without a token in pods, by which they pull their images.
pub fn service_account(metadata: ObjectMeta, settings: &Settings) -> ServiceAccount {
    let reference = |name: &String| LocalObjectReference { name: name.clone() };
    let secrets: Vec<_> = settings.image_pull_secrets.iter().map(reference).collect();
    ServiceAccount {
        metadata,
        automount_service_account_token: Some(false),
        image_pull_secrets: (!secrets.is_empty()).then_some(secrets),
        ..ServiceAccount::default()
    }
}

/// A volume with a ConfigMap's files.
pub fn config_map_volume(volume: &str, config_map: String) -> Volume {
    Volume {
        name: volume.to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: config_map, ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    }
}

/// A volume with one file, `password`, from the Secret's key of that name.
pub fn password_volume(volume: &str, secret: String) -> Volume {
    let password = KeyToPath { key: PASSWORD.to_owned(), path: PASSWORD.to_owned(), mode: None };
    Volume {
        name: volume.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret),
            items: Some(vec![password]),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Key of a Secret, and name of the file that it becomes.
pub const PASSWORD: &str = "password";

/// A read-only mount.
pub fn mount(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    }
}

/// A pod template with the defaults that it is to have, and the annotations by which the next plan finds out.
#[derive(Debug)]
pub struct Pinned {
    pub template: PodTemplateSpec,
    pub annotations: BTreeMap<String, String>,
}

/// Makes a template with the defaults that the live workload was made with, as long as nothing else of the template changed and
/// nobody asked for the newest; else with `newest`. So another operator, or another configuration of it, restarts nothing. What
/// pods cannot run with is `newest` in any case, so that a mistake in that configuration can be corrected.
pub fn pin<E>(
    live: Option<&Workload>,
    newest: Defaults,
    upgrade: bool,
    template: impl Fn(&Defaults) -> Result<PodTemplateSpec, E>,
) -> Result<Pinned, E> {
    // structs of Kubernetes' own always have a form in JSON
    let hash = version::of(&template(&Defaults::default())?);
    let kept = live.filter(|live| !upgrade && live.annotations.get(TEMPLATE_HASH_ANNOTATION) == Some(&hash));
    let defaults = match kept.and_then(|live| Some((live, defaults(&live.annotations)?))) {
        Some((live, kept)) => corrected(kept, live, newest),
        None => newest,
    };
    let text = serde_json::to_string(&defaults).unwrap_or_default();
    let annotations = [(DEFAULTS_ANNOTATION, text), (TEMPLATE_HASH_ANNOTATION, hash)];
    Ok(Pinned {
        template: template(&defaults)?,
        annotations: annotations.map(|(key, value)| (key.to_owned(), value)).into(),
    })
}

/// Those that a workload was made with, except what keeps its pods from running. An image that can be had stays: pods that find no
/// node for a while are no reason for another PostgreSQL, which may sort text in another way than the indexes that exist.
fn corrected(kept: Defaults, live: &Workload, newest: Defaults) -> Defaults {
    let never_fits = live.ready == 0 && is_about_resources(&live.problems);
    let resources = if never_fits { newest.resources } else { kept.resources };
    let (image, image_pull_policy) = if live.missing_images.contains(&kept.image) {
        (newest.image, newest.image_pull_policy)
    } else {
        (kept.image, kept.image_pull_policy)
    };
    Defaults { image, image_pull_policy, resources }
}

/// Those that a workload or Job with these annotations was made with.
pub fn defaults(annotations: &BTreeMap<String, String>) -> Option<Defaults> {
    serde_json::from_str(annotations.get(DEFAULTS_ANNOTATION)?).ok()
}

/// Does the custom resource ask for the operator's own data-plane image at once?
pub fn wants_upgrade<K: ResourceExt>(object: &K) -> bool {
    object.annotations().get(UPGRADE_ANNOTATION).is_some_and(|value| value == "now")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use k8s_openapi::api::core::v1::Container;

    use super::*;
    use crate::controllers::{
        fixtures::settings,
        resources::{observed::Problem, reason::Reason},
    };

    fn template(port: i32) -> impl Fn(&Defaults) -> Result<PodTemplateSpec, Infallible> {
        move |defaults| {
            let container = Container {
                name: "weft".to_owned(),
                image: Some(defaults.image.clone()),
                resources: Some(defaults.resources.clone()),
                args: Some(vec![port.to_string()]),
                ..Container::default()
            };
            let spec = PodSpec { containers: vec![container], ..PodSpec::default() };
            Ok(PodTemplateSpec { spec: Some(spec), ..PodTemplateSpec::default() })
        }
    }

    /// `IMAGE MEMORY`, as the container has them.
    fn made_with(pinned: &Pinned) -> String {
        let container = &pinned.template.spec.as_ref().unwrap().containers[0];
        let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref()).unwrap();
        format!("{} {}", container.image.as_deref().unwrap(), limits["memory"].0)
    }

    fn defaults(image: &str, memory: &str) -> Defaults {
        let resources = serde_json::from_value(serde_json::json!({"limits": {"memory": memory}})).unwrap();
        Defaults { image: image.to_owned(), ..settings().defaults(&resources) }
    }

    fn live(pinned: &Pinned) -> Workload {
        Workload { annotations: pinned.annotations.clone(), ready: 1, ..Workload::default() }
    }

    fn first() -> Pinned {
        let Ok(first) = pin(None, defaults("weft:1", "1Gi"), false, template(1));
        first
    }

    #[test]
    fn a_new_operator_keeps_what_a_workload_has() {
        let Ok(second) = pin(Some(&live(&first())), defaults("weft:2", "2Gi"), false, template(1));
        assert_eq!(made_with(&second), "weft:1 1Gi");
        assert_eq!(first().template, second.template);
        assert_eq!(first().annotations, second.annotations);
    }

    #[test]
    fn what_keeps_pods_from_running_is_not_kept() {
        let failing = |image: &str| Workload { missing_images: vec![image.to_owned()], ..live(&first()) };
        let Ok(second) = pin(Some(&failing("weft:1")), defaults("mirror/weft:1", "2Gi"), false, template(1));
        let Ok(third) = pin(Some(&failing("shop/orders:3")), defaults("weft:2", "2Gi"), false, template(1));
        assert_eq!((made_with(&second).as_str(), made_with(&third).as_str()), ("mirror/weft:1 1Gi", "weft:1 1Gi"));

        let problems = vec![Problem::new(Reason::QuotaExceeded, "exceeded quota: small")];
        let refused = |ready| Workload { ready, problems: problems.clone(), ..live(&first()) };
        let Ok(corrected) = pin(Some(&refused(0)), defaults("weft:1", "64Mi"), false, template(1));
        let Ok(kept) = pin(Some(&refused(1)), defaults("weft:2", "64Mi"), false, template(1));
        assert_eq!((made_with(&corrected).as_str(), made_with(&kept).as_str()), ("weft:1 64Mi", "weft:1 1Gi"));
    }

    /// Another image of PostgreSQL can sort text in another way, which breaks the indexes that exist.
    #[test]
    fn a_pod_that_finds_no_node_keeps_its_image() {
        let problems = vec![Problem::new(Reason::Unschedulable, "0/3 nodes are available")];
        let drained = Workload { ready: 0, problems, ..live(&first()) };
        let Ok(moved) = pin(Some(&drained), defaults("weft:2", "64Mi"), false, template(1));
        assert_eq!(made_with(&moved), "weft:1 64Mi");
    }

    #[test]
    fn another_change_of_the_template_takes_the_new_defaults_along() {
        let Ok(second) = pin(Some(&live(&first())), defaults("weft:2", "2Gi"), false, template(2));
        assert_eq!(made_with(&second), "weft:2 2Gi");
    }

    #[test]
    fn whoever_asks_for_the_new_defaults_gets_them_and_keeps_them() {
        let Ok(second) = pin(Some(&live(&first())), defaults("weft:2", "2Gi"), true, template(1));
        let Ok(third) = pin(Some(&live(&second)), defaults("weft:3", "3Gi"), false, template(1));
        assert_eq!((made_with(&second).as_str(), made_with(&third).as_str()), ("weft:2 2Gi", "weft:2 2Gi"));
    }

    #[test]
    fn a_workload_that_weft_did_not_write_gets_the_new_defaults() {
        let Ok(pinned) = pin(Some(&Workload::default()), defaults("weft:1", "1Gi"), false, template(1));
        assert_eq!(made_with(&pinned), "weft:1 1Gi");
    }
}
