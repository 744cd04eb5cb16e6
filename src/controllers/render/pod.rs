//! What every pod that Weft makes has in common: it passes Pod Security `restricted`, and it keeps the image that it was
//! made with until it changes for another reason.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, KeyToPath, LocalObjectReference, PodSecurityContext, PodTemplateSpec,
        ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, ServiceAccount, Volume, VolumeMount,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    controllers::resources::{
        labels::{IMAGE_ANNOTATION, TEMPLATE_HASH_ANNOTATION, UPGRADE_ANNOTATION},
        observed::Workload,
        settings::Settings,
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

/// CPU and memory that a container of Weft's gets in any case, and at most. The limits leave room for bursts: they are there
/// because a namespace with a quota admits no pod without.
pub fn resources(least: (&str, &str), most: (&str, &str)) -> ResourceRequirements {
    let list = |(cpu, memory): (&str, &str)| {
        Some([("cpu", cpu), ("memory", memory)].map(|(key, value)| (key.to_owned(), Quantity(value.to_owned()))).into())
    };
    ResourceRequirements { requests: list(least), limits: list(most), ..ResourceRequirements::default() }
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

/// A pod template with the image that it is to have, and the annotations by which the next plan finds out.
#[derive(Debug)]
pub struct Pinned {
    pub template: PodTemplateSpec,
    pub annotations: BTreeMap<String, String>,
}

/// Makes a template with the image that the live workload has, as long as nothing else of the template changed, nobody asked
/// for the newest, and the image can be had; else with `newest`. So a new operator restarts nothing, and a mistake in the
/// operator's own configuration can be corrected.
pub fn pin_image<E>(
    live: Option<&Workload>,
    newest: &str,
    upgrade: bool,
    template: impl Fn(&str) -> Result<PodTemplateSpec, E>,
) -> Result<Pinned, E> {
    // a struct of Kubernetes' own always has a form in JSON
    let hash = version::of(&template("")?);
    let kept = live
        .filter(|live| !upgrade && live.annotations.get(TEMPLATE_HASH_ANNOTATION) == Some(&hash))
        .and_then(|live| live.annotations.get(IMAGE_ANNOTATION).filter(|image| !live.missing_images.contains(image)));
    let image = kept.map_or(newest, String::as_str);
    let annotations = [(IMAGE_ANNOTATION, image), (TEMPLATE_HASH_ANNOTATION, &hash)];
    Ok(Pinned {
        template: template(image)?,
        annotations: annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    })
}

/// Does the custom resource ask for the operator's own data-plane image at once?
pub fn wants_upgrade<K: ResourceExt>(object: &K) -> bool {
    object.annotations().get(UPGRADE_ANNOTATION).is_some_and(|value| value == "now")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use k8s_openapi::api::core::v1::{Container, PodSpec};

    use super::*;

    fn template(port: i32) -> impl Fn(&str) -> Result<PodTemplateSpec, Infallible> {
        move |image| {
            let container = Container {
                name: "weft".to_owned(),
                image: Some(image.to_owned()),
                args: Some(vec![port.to_string()]),
                ..Container::default()
            };
            let spec = PodSpec { containers: vec![container], ..PodSpec::default() };
            Ok(PodTemplateSpec { spec: Some(spec), ..PodTemplateSpec::default() })
        }
    }

    fn image(pinned: &Pinned) -> &str {
        pinned.template.spec.as_ref().unwrap().containers[0].image.as_deref().unwrap()
    }

    fn live(pinned: &Pinned) -> Workload {
        Workload { annotations: pinned.annotations.clone(), ..Workload::default() }
    }

    #[test]
    fn a_new_operator_keeps_the_image_that_a_workload_has() {
        let Ok(first) = pin_image(None, "weft:1", false, template(1));
        let Ok(second) = pin_image(Some(&live(&first)), "weft:2", false, template(1));
        assert_eq!((image(&first), image(&second)), ("weft:1", "weft:1"));
        assert_eq!(first.template, second.template);
        assert_eq!(first.annotations, second.annotations);
    }

    #[test]
    fn an_image_that_cannot_be_had_is_not_kept() {
        let Ok(first) = pin_image(None, "weft:1", false, template(1));
        let failing = |image: &str| Workload { missing_images: vec![image.to_owned()], ..live(&first) };
        let Ok(second) = pin_image(Some(&failing("weft:1")), "mirror/weft:1", false, template(1));
        let Ok(third) = pin_image(Some(&failing("shop/orders:3")), "weft:2", false, template(1));
        assert_eq!((image(&second), image(&third)), ("mirror/weft:1", "weft:1"));
    }

    #[test]
    fn another_change_of_the_template_takes_the_new_image_along() {
        let Ok(first) = pin_image(None, "weft:1", false, template(1));
        let Ok(second) = pin_image(Some(&live(&first)), "weft:2", false, template(2));
        assert_eq!(image(&second), "weft:2");
    }

    #[test]
    fn whoever_asks_for_the_new_image_gets_it_and_keeps_it() {
        let Ok(first) = pin_image(None, "weft:1", false, template(1));
        let Ok(second) = pin_image(Some(&live(&first)), "weft:2", true, template(1));
        let Ok(third) = pin_image(Some(&live(&second)), "weft:3", false, template(1));
        assert_eq!((image(&second), image(&third)), ("weft:2", "weft:2"));
    }

    #[test]
    fn a_workload_that_weft_did_not_write_gets_the_new_image() {
        let Ok(pinned) = pin_image(Some(&Workload::default()), "weft:1", false, template(1));
        assert_eq!(image(&pinned), "weft:1");
    }
}
