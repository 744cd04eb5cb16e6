//! Databases that are not on a server of the service's own.

use super::*;
use crate::{api::v1alpha1::SetUp, controllers::resources::observed::Host};

fn external(more: &str) -> Microservice {
    microservice("orders", &format!("{{image: i, database: {{external: {{secret: production}}{more}}}}}"))
}

fn guest(more: &str) -> Microservice {
    let shared = format!("{{service: customers, schema: orders{more}}}");
    microservice("orders", &format!("{{image: i, database: {{sharedWith: {shared}}}}}"))
}

/// The host is there, and set up.
fn hosted() -> Observed {
    let mut observed = Observed::default();
    observed.database.server = Some(Workload { uid: "uid-of-the-server".to_owned(), ..ready(1) });
    observed.database.host = Host::Found(Arc::new(microservice("customers", "{image: i, database: {postgres: {}}}")));
    observed.database.host_set_up = Some(SetUp { hash: "0".to_owned(), ..SetUp::default() });
    observed
}

fn with_set_up(object: &Microservice, mut observed: Observed) -> Observed {
    let plan = plan(object, &observed, &settings()).unwrap();
    let job = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned));
    observed.database.jobs.insert(job.unwrap(), fixtures::job(JobOutcome::Succeeded));
    observed
}

/// The Secrets of a plan: a database that was never set up has them made.
fn secrets(plan: Plan) -> String {
    let children = plan.children.into_iter().filter(|child| matches!(child, Child::Secret(_))).collect();
    fixtures::yaml(&Plan { children, ..Plan::default() })
}

#[test]
fn a_service_with_an_external_database_and_a_relay() {
    let mut observed = Observed { relays: vec![relay_of("orders")], ..Observed::default() };
    let before = plan(&external(""), &observed, &settings()).unwrap();
    observed = with_set_up(&external(""), observed);
    let job = fixtures::names(&before).into_iter().find(|name| name.starts_with("Job/")).unwrap();
    let after = plan(&external(""), &observed, &settings()).unwrap();
    let job = serde_yaml::to_string(&find(&before, &job)["spec"]["template"]).unwrap();
    let (after, secrets) = (fixtures::yaml(&after), secrets(before));
    insta::assert_snapshot!(format!("{after}--- # the set-up's pod\n{job}--- # before it\n{secrets}"));
}

/// The superuser's login is for the set-up alone, and the service's for service and set-up.
#[test]
fn no_container_gets_more_of_an_external_secret_than_it_uses() {
    let mut observed = Observed { relays: vec![relay_of("orders")], ..Observed::default() };
    let before = plan(&external(""), &observed, &settings()).unwrap();
    observed = with_set_up(&external(""), observed);
    let after = plan(&external(""), &observed, &settings()).unwrap();
    let keys = |pod: &Value, container: &str| {
        let list =
            ["initContainers", "containers"].into_iter().flat_map(|list| pod[list].as_array().into_iter().flatten());
        let container = list.into_iter().find(|one| one["name"] == container).unwrap().clone();
        let mounts = container["volumeMounts"].as_array().unwrap().iter().map(|mount| mount["name"].clone());
        let mounts: Vec<_> = mounts.collect();
        let volumes = pod["volumes"].as_array().unwrap().iter().filter(|volume| mounts.contains(&volume["name"]));
        let sources = volumes.flat_map(|volume| volume["projected"]["sources"].as_array().cloned().unwrap_or_default());
        let items = sources.flat_map(|source| source["secret"]["items"].as_array().unwrap().clone());
        items.map(|item| item["key"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    };
    let job = fixtures::names(&before).into_iter().find(|name| name.starts_with("Job/")).unwrap();
    let set_up = keys(&find(&before, &job)["spec"]["template"]["spec"], "setup");
    assert!(set_up.contains("admin-password") && set_up.contains(" password"), "{set_up}");
    let pod = find(&after, "Deployment/orders")["spec"]["template"]["spec"].clone();
    let (service, relay) = (keys(&pod, "service"), keys(&pod, "weft-relay"));
    assert!(service.contains("password") && !service.contains("admin"), "{service}");
    assert_eq!(relay, "host port database sslmode ca.crt tls.crt tls.key");
    fixtures::assert_restricted(&pod);
}

#[test]
fn an_external_server_is_asked_for_the_transaction_log_where_a_relay_reads_it() {
    let contract = |relays| {
        let observed = Observed { relays, ..Observed::default() };
        let plan = plan(&external(""), &observed, &settings()).unwrap();
        let job = fixtures::names(&plan).into_iter().find(|name| name.starts_with("Job/")).unwrap();
        let annotations = find(&plan, &job)["spec"]["template"]["metadata"]["annotations"].clone();
        annotations["weft.dev/contract"].as_str().unwrap().to_owned()
    };
    let polling = "{microservice: orders, mode: Polling, sink: {nats: {servers: ['nats://n']}}}";
    assert!(contract(vec![relay_of("orders")]).contains("logTailing: true"));
    assert!(!contract(vec![fixtures::relay("orders", polling)]).contains("logTailing"));
}

#[test]
fn a_service_in_the_database_of_another() {
    let guest = guest(", reads: [customers, public.cards]");
    let secrets = secrets(plan(&guest, &hosted(), &settings()).unwrap());
    let plan = plan(&guest, &with_set_up(&guest, hosted()), &settings()).unwrap();
    assert!(!fixtures::names(&plan).iter().any(|name| name.starts_with("StatefulSet/")), "no pod of its own");
    insta::assert_snapshot!(format!("{}--- # before the set-up\n{secrets}", fixtures::yaml(&plan)));
}

#[test]
fn a_guest_waits_for_its_host_and_is_set_up_again_after_it() {
    let jobs = |observed: &Observed| -> Vec<String> {
        let plan = plan(&guest(""), observed, &settings()).unwrap();
        fixtures::names(&plan).into_iter().filter(|name| name.starts_with("Job/")).collect()
    };
    let mut observed = hosted();
    let first = jobs(&observed);
    assert_eq!(first.len(), 1);
    observed.database.host_set_up.as_mut().unwrap().hash = "1".to_owned();
    assert_ne!(jobs(&observed), first, "the host's migrations may have made a table anew");
    observed.database.host_set_up = None;
    assert!(jobs(&observed).is_empty());
    assert!(jobs(&Observed::default()).is_empty(), "a host that does not exist is waited for");
}

#[test]
fn only_a_service_with_a_server_of_its_own_is_a_host() {
    let refused = |host: &str| {
        let mut observed = hosted();
        observed.database.host = Host::Found(Arc::new(microservice("customers", host)));
        let refused = plan(&guest(""), &observed, &settings()).unwrap_err();
        assert_eq!(refused.reason, Reason::NotShareable);
        refused.message
    };
    assert_eq!(
        refused("{image: i, database: {sharedWith: {service: orders, schema: c}}}"),
        "spec.database.sharedWith.service: `customers` is in the database of `orders` itself, so neither has a server: give one of them spec.database.postgres"
    );
    assert_eq!(
        refused("{image: i, database: {sharedWith: {service: suppliers, schema: c}}}"),
        "spec.database.sharedWith.service: `customers` has no server of its own, it is in that of `suppliers`: name `suppliers` instead"
    );
    assert!(refused("{image: i}").contains("`customers` has no database"));
    assert!(refused("{image: i, database: {external: {secret: s}}}").contains("is external"));
}

#[test]
fn a_server_with_guests_outlives_its_own_service_with_its_data() {
    let orders = microservice("orders", "{image: i, database: {postgres: {}, retention: Delete}}");
    let mut observed =
        Observed { guests: vec![Arc::new(microservice("reports", "{image: i}"))], ..Observed::default() };
    observed.database.recorded = Some(SetUp::default());
    let plan = plan(&orders, &observed, &settings()).unwrap();
    let server = find(&plan, "StatefulSet/orders-db");
    let owners: Vec<_> =
        server["metadata"]["ownerReferences"].as_array().unwrap().iter().map(|one| one["name"].clone()).collect();
    assert_eq!(owners, ["orders", "reports"]);
    assert_eq!(server["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"], "Retain");
    for child in
        ["Service/orders-db", "NetworkPolicy/orders-db", "ServiceAccount/orders-db", "ConfigMap/orders-db-setup"]
    {
        assert_eq!(find(&plan, child)["metadata"]["ownerReferences"].as_array().unwrap().len(), 2, "{child}");
    }
    assert_eq!(find(&plan, "ServiceAccount/orders")["metadata"]["ownerReferences"].as_array().unwrap().len(), 1);
    assert_eq!(server["metadata"]["annotations"]["weft.dev/guests"], r#"["reports"]"#);

    // after a restart of the operator, one of them cannot be read
    let guest = reference(observed.guests.remove(0).as_ref());
    observed.unreadable_guests = vec![guest];
    assert_eq!(find(&self::plan(&orders, &observed, &settings()).unwrap(), "StatefulSet/orders-db"), server);
}
