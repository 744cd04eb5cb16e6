//! Accounts and credentials of the broker that is installed with Weft: NATS in operator mode, one account for each namespace.
//!
//! Every key is derived from one [`Seed`] (HMAC-SHA-256 of what it is for), so nothing else has to be kept: whoever has the seed
//! makes the same accounts and credentials again. Form and meaning of the tokens:
//! <https://docs.nats.io/running-a-nats-service/nats_admin/security/jwt>, `nats-io/jwt` version 2.

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use hmac::{Hmac, Mac};
use nkeys::{KeyPair, KeyPairType};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::domain::version::short_hash;

/// The header of every token.
const HEADER: &str = r#"{"typ":"JWT","alg":"ed25519-nkey"}"#;
/// Time of issue of every token [s since 1970]: a constant, so that the same seed gives the same token.
const ISSUED_AT: u64 = 1_577_836_800;
/// Version of the tokens' form.
const VERSION: u32 = 2;
/// Hex digits of a [`fingerprint`].
pub const FINGERPRINT: usize = 8;
/// Prefix of the subjects on which a relay is answered: what others of the account receive under `_INBOX` is not for it.
pub const RELAY_INBOX: &str = "_INBOX_RELAY";

/// Random text of at least 190 bits.
#[derive(Clone)]
struct Seed(String);

/// The accounts of one broker.
#[derive(Clone)]
pub struct Accounts(Seed);

/// What the holder of credentials may do in the namespace's account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Access {
    /// Make streams and publish into them: a relay.
    Publish,
    /// Read streams by consumers of one's own: an orchestrator, or a service that subscribes.
    Consume,
    /// Everything: a person.
    Administer,
}

impl Accounts {
    /// `seed` is random, at least 32 characters long and printable.
    pub fn new(seed: String) -> Self {
        Self(Seed(seed))
    }

    /// What [`Accounts::new`] was given.
    pub fn seed(&self) -> &str {
        &self.0.0
    }

    /// The part of a server's configuration by which it trusts these accounts, and no others. `folder` is where it keeps the accounts
    /// that it was given.
    pub fn server_config(&self, folder: &str) -> String {
        let (operator, system) = (self.operator(), self.system());
        let trust = token(&operator, &operator.public_key(), "weft", &json!({"type": "operator", "version": VERSION}));
        let account = account_token(&operator, &system, "SYS", &json!({}));
        format!(
            "operator: {trust}\nsystem_account: {id}\nresolver: {{type: full, dir: \"{folder}\", allow_delete: false}}\nresolver_preload: {{{id}: {account}}}\n",
            id = system.public_key(),
        )
    }

    /// The token by which a server that trusts these accounts has the account of `namespace`.
    pub fn account(&self, namespace: &str) -> String {
        let jet_stream = json!({"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1});
        account_token(&self.operator(), &self.account_key(namespace), namespace, &jet_stream)
    }

    /// The content of a credentials file: for `user`, in the account of `namespace`.
    pub fn credentials(&self, namespace: &str, user: &str, access: Access) -> String {
        let key = self.key(KeyPairType::User, &format!("user/{namespace}/{user}/{}", access.as_str()));
        credentials(&self.account_key(namespace), &key, user, &access.permissions())
    }

    /// The content of the credentials file of whoever gives accounts to the server, and nothing else.
    pub fn system_credentials(&self) -> String {
        let key = self.key(KeyPairType::User, "user/system");
        let permissions = json!({"pub": {"allow": ["$SYS.REQ.CLAIMS.UPDATE"]}, "sub": {"allow": ["_INBOX.>"]}});
        credentials(&self.system(), &key, "weft-operator", &permissions)
    }

    fn operator(&self) -> KeyPair {
        self.key(KeyPairType::Operator, "operator")
    }

    fn system(&self) -> KeyPair {
        self.key(KeyPairType::Account, "account/system")
    }

    /// A namespace's name has no `/`, so no account is another one's.
    fn account_key(&self, namespace: &str) -> KeyPair {
        self.key(KeyPairType::Account, &format!("account/namespace/{namespace}"))
    }

    #[expect(clippy::expect_used, reason = "HMAC has keys of any length, and 32 bytes are always a key pair")]
    fn key(&self, kind: KeyPairType, purpose: &str) -> KeyPair {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.0.as_bytes()).expect("a key of any length");
        mac.update(purpose.as_bytes());
        KeyPair::new_from_raw(kind, mac.finalize().into_bytes().into()).expect("32 bytes")
    }
}

impl fmt::Debug for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accounts").finish_non_exhaustive()
    }
}

/// Of credentials: others (of a broker with other keys, or that allow something else) have another one.
pub fn fingerprint(credentials: &str) -> String {
    short_hash(credentials.as_bytes(), FINGERPRINT)
}

impl Access {
    /// Keys depend on it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Consume => "consume",
            Self::Administer => "administer",
        }
    }

    /// The same for every stream, so that credentials stay valid when a stream or subject is edited.
    fn permissions(self) -> Value {
        match self {
            // of JetStream's interface it may make streams and read what they are like
            Self::Publish => json!({
                "pub": {"allow": [">"], "deny": [
                    "$JS.ACK.>", "$JS.FC.>", "$JS.API.CONSUMER.>", "$JS.API.DIRECT.>", "$JS.API.STREAM.DELETE.>", "$JS.API.STREAM.MSG.>",
                    "$JS.API.STREAM.PURGE.>", "$JS.API.STREAM.RESTORE.>", "$JS.API.STREAM.SNAPSHOT.>", "$JS.API.STREAM.UPDATE.>",
                ]},
                "sub": {"allow": [format!("{RELAY_INBOX}.>")]},
            }),
            Self::Consume => json!({
                "pub": {"allow": [
                    "$JS.ACK.>", "$JS.API.CONSUMER.>", "$JS.API.DIRECT.GET.>", "$JS.API.INFO", "$JS.API.STREAM.INFO.*",
                    "$JS.API.STREAM.LIST", "$JS.API.STREAM.MSG.GET.*", "$JS.API.STREAM.NAMES", "$JS.FC.>",
                ]},
                "sub": {"allow": [">"]},
            }),
            Self::Administer => json!({}),
        }
    }
}

/// -1: without a limit.
fn unlimited() -> Value {
    json!({"subs": -1, "data": -1, "payload": -1})
}

fn account_token(operator: &KeyPair, account: &KeyPair, name: &str, jet_stream: &Value) -> String {
    let own = json!({"imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": 0});
    let limits = merged([&unlimited(), &own, jet_stream]);
    let nats = json!({"limits": limits, "default_permissions": {}, "type": "account", "version": VERSION});
    token(operator, &account.public_key(), name, &nats)
}

#[expect(clippy::expect_used, reason = "a key pair that was made from its secret half has one")]
fn credentials(account: &KeyPair, user: &KeyPair, name: &str, permissions: &Value) -> String {
    let nats = merged([&unlimited(), permissions, &json!({"type": "user", "version": VERSION})]);
    let token = token(account, &user.public_key(), name, &nats);
    let seed = user.seed().expect("the secret half");
    format!(
        "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

fn merged<const N: usize>(objects: [&Value; N]) -> Value {
    let members = objects.into_iter().filter_map(Value::as_object).flatten();
    members.map(|(name, value)| (name.clone(), value.clone())).collect::<serde_json::Map<_, _>>().into()
}

/// A token about `subject`, signed by `issuer`. The id is a hash of the rest: a server ignores a token whose id it has.
#[expect(clippy::expect_used, reason = "a key pair that was made from its secret half signs")]
fn token(issuer: &KeyPair, subject: &str, name: &str, nats: &Value) -> String {
    let mut claims = json!({"iat": ISSUED_AT, "iss": issuer.public_key(), "name": name, "nats": nats, "sub": subject});
    let id = short_hash(claims.to_string().as_bytes(), 52);
    if let Some(claims) = claims.as_object_mut() {
        claims.insert("jti".to_owned(), id.into());
    }
    let signed = format!("{}.{}", BASE64.encode(HEADER), BASE64.encode(claims.to_string()));
    let signature = issuer.sign(signed.as_bytes()).expect("the secret half");
    format!("{signed}.{}", BASE64.encode(signature))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::new("0123456789abcdef0123456789abcdef".to_owned())
    }

    fn claims(token: &str) -> Value {
        serde_json::from_slice(&BASE64.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_keys_and_another_seed_others() {
        let other = Accounts::new("another".to_owned());
        assert_eq!(accounts().account("shop"), accounts().account("shop"));
        assert_ne!(accounts().account("shop"), other.account("shop"));
        assert_ne!(accounts().account("shop"), accounts().account("delivery"));
        let publish = |user| accounts().credentials("shop", user, Access::Publish);
        assert_ne!(fingerprint(&publish("orders")), fingerprint(&other.credentials("shop", "orders", Access::Publish)));
        assert_eq!(publish("orders"), publish("orders"));
        assert_ne!(publish("orders"), publish("customers"));
        assert_ne!(publish("orders"), accounts().credentials("shop", "orders", Access::Consume));
    }

    #[test]
    fn a_token_is_signed_by_whom_it_names() {
        let token = accounts().account("shop");
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let issuer = claims(&token)["iss"].as_str().unwrap().to_owned();
        assert!(issuer.starts_with('O') && accounts().server_config("/data/accounts").contains("resolver"));
        KeyPair::from_public_key(&issuer)
            .unwrap()
            .verify(signed.as_bytes(), &BASE64.decode(signature).unwrap())
            .unwrap();
    }

    #[test]
    fn nothing_that_is_shown_contains_the_seed() {
        let seed = "0123456789abcdef0123456789abcdef";
        assert!(!format!("{:?}", accounts()).contains(seed));
        for text in [accounts().server_config("/data"), accounts().account("shop"), accounts().system_credentials()] {
            assert!(!text.contains(seed));
        }
        let config = accounts().server_config("/data");
        for key in [accounts().operator(), accounts().system()] {
            assert!(!config.contains(&key.seed().unwrap()));
        }
    }
}
