//! Another service cannot reach the database: not by the network, not by its role, not by the Secret.

use anyhow::{Result, ensure};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
    core::v1::Secret,
};
use kube::{Api, api::PostParams};
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, microservice, scenario};

#[tokio::test]
async fn own_database() {
    scenario("own_database", Company::Others, async |world| {
        world.install(&world.release()).await?;
        for service in ["orders", "customers"] {
            world.apply_service(&microservice(service)).await?;
        }
        for service in ["orders", "customers"] {
            world.ready::<Microservice>(service).await?;
        }
        by_network(world).await?;
        by_role(world).await?;
        by_secret(world).await
    })
    .await;
}

async fn by_network(world: &Scenario) -> Result<()> {
    world.service_says("orders", &["connect", "orders-db:5432"], "connected").await?;
    let other = world.in_service("customers", &["connect", "orders-db:5432"]).await?;
    ensure!(other != "connected", "customers reached the database of orders over the network");
    Ok(())
}

/// Where the network lets one through, from a pod of orders, the credentials of customers are worth nothing.
async fn by_role(world: &Scenario) -> Result<()> {
    world.service_says("orders", &["log-in"], "entered").await?;
    let theirs = world.get::<Secret>("customers-db").await?;
    let theirs = theirs.and_then(|secret| secret.data).and_then(|mut data| data.remove("uri")).unwrap_or_default();
    let theirs = String::from_utf8(theirs.0)?;
    ensure!(theirs.starts_with("postgres"), "the Secret customers-db has no `uri`");
    for database in ["orders", "postgres"] {
        let arguments = ["log-in", "--database-url", &theirs, "--host", "orders-db", "--database", database];
        let answer = world.in_service("orders", &arguments).await?;
        // invalid_password; invalid_authorization_specification
        ensure!(
            ["28P01", "28000"].contains(&answer.as_str()),
            "the login of customers at orders-db/{database}: {answer}"
        );
    }
    Ok(())
}

/// No pod of the other service has the Secret, and its service account has no right to read it.
async fn by_secret(world: &Scenario) -> Result<()> {
    for pod in world.pods("customers", "service").await? {
        let text = serde_json::to_string(&pod.spec)?;
        ensure!(!text.contains("orders-db"), "a pod of customers mentions the Secret of orders");
        let spec = pod.spec.unwrap_or_default();
        ensure!(
            spec.automount_service_account_token == Some(false),
            "a pod of customers has a token of the API server"
        );
    }
    for account in ["customers", "default"] {
        for verb in ["get", "list", "watch"] {
            ensure!(
                !may_read(world, account, verb, "orders-db").await?,
                "service account {account} may {verb} orders-db"
            );
        }
    }
    Ok(())
}

async fn may_read(world: &Scenario, account: &str, verb: &str, secret: &str) -> Result<bool> {
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{}:{account}", world.namespace)),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(world.namespace.clone()),
                resource: Some("secrets".to_owned()),
                name: Some(secret.to_owned()),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let answer = Api::all(world.client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}
