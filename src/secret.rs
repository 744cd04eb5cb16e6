//! A Secret as a folder: one file for each of its keys. The keys are those of Kubernetes' own types: `ca.crt`, `tls.crt` and
//! `tls.key` (`kubernetes.io/tls`), `username` and `password` (`kubernetes.io/basic-auth`); and `token`, `nats.creds`.
//!
//! Files are read when a connection is made, so another content of the Secret needs no restart. Errors name the file and
//! never what is in it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    client::WebPkiServerVerifier,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::outage::Failure;

pub const CA: &str = "ca.crt";
pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
pub const USERNAME: &str = "username";
pub const PASSWORD: &str = "password";
pub const TOKEN: &str = "token";
pub const NATS_CREDENTIALS: &str = "nats.creds";

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("the Secret does not exist, or has no keys")]
    Empty,
    #[error("{0} of the Secret cannot be read: {1}")]
    Unreadable(String, io::ErrorKind),
    #[error("{0} of the Secret is not text")]
    NotText(String),
    #[error("{0} of the Secret has no certificate in PEM form")]
    NoCertificate(String),
    #[error("{0} of the Secret has no private key in PEM form")]
    NoKey(String),
    #[error("the Secret has {0} without {1}: give both, or neither")]
    Half(&'static str, &'static str),
    #[error("{CERTIFICATE} and {KEY} of the Secret do not fit each other")]
    Mismatch,
}

/// Without its credentials nobody gets in: the server need not be asked.
impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        Self::Refused(format!("the credentials cannot be used: {error}"))
    }
}

/// The folder; `None` has no keys.
#[derive(Clone, Debug, Default)]
pub struct SecretFolder(Option<PathBuf>);

impl SecretFolder {
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self(folder)
    }

    /// Path of a key's file, if the Secret has the key.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        self.0.as_ref().map(|folder| folder.join(key)).filter(|path| path.exists())
    }

    /// The bytes of a key. `None`: the Secret has no such key.
    pub async fn bytes(&self, key: &str) -> Result<Option<Vec<u8>>, SecretError> {
        let Some(folder) = &self.0 else { return Ok(None) };
        match tokio::fs::read(folder.join(key)).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_empty(folder).await => Err(SecretError::Empty),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(SecretError::Unreadable(key.to_owned(), error.kind())),
        }
    }

    /// The text of a key, without line breaks at its end: people make Secrets with `echo`.
    pub async fn text(&self, key: &str) -> Result<Option<String>, SecretError> {
        let Some(bytes) = self.bytes(key).await? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|_| SecretError::NotText(key.to_owned()))?;
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }

    /// `username` and `password`, when the Secret has them.
    pub async fn login(&self) -> Result<Option<(String, String)>, SecretError> {
        both([USERNAME, PASSWORD], self.text(USERNAME).await?, self.text(PASSWORD).await?)
    }

    /// A server is trusted by `ca.crt`, or by the system's certificates where the Secret has none. `tls.crt` and `tls.key`
    /// identify the client.
    pub async fn tls(&self) -> Result<ClientConfig, SecretError> {
        self.tls_with_verifier().await.map(|(config, _)| config)
    }

    /// The same, with what verifies a server in it.
    pub async fn tls_with_verifier(&self) -> Result<(ClientConfig, Arc<WebPkiServerVerifier>), SecretError> {
        let mut roots = RootCertStore::empty();
        if let Some(pem) = self.bytes(CA).await? {
            for certificate in certificates(CA, &pem)? {
                roots.add(certificate).map_err(|_| SecretError::NoCertificate(CA.to_owned()))?;
            }
        } else {
            // what cannot be read of the system's is not trusted
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let verifier = verifier.map_err(|_| SecretError::NoCertificate(CA.to_owned()))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| SecretError::Mismatch)?
            .with_webpki_verifier(verifier.clone());
        let config = match both([CERTIFICATE, KEY], self.bytes(CERTIFICATE).await?, self.bytes(KEY).await?)? {
            Some((chain, key)) => {
                let chain = certificates(CERTIFICATE, &chain)?;
                let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| SecretError::NoKey(KEY.to_owned()))?;
                config.with_client_auth_cert(chain, key).map_err(|_| SecretError::Mismatch)?
            }
            None => config.with_no_client_auth(),
        };
        Ok((config, verifier))
    }
}

/// Two keys that are worth nothing without each other.
pub fn both<T>([a, b]: [&'static str; 2], first: Option<T>, second: Option<T>) -> Result<Option<(T, T)>, SecretError> {
    match (first, second) {
        (Some(first), Some(second)) => Ok(Some((first, second))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(SecretError::Half(a, b)),
        (None, Some(_)) => Err(SecretError::Half(b, a)),
    }
}

/// Whether no key is there; what begins with two dots is the kubelet's.
async fn is_empty(folder: &Path) -> bool {
    let Ok(mut entries) = tokio::fs::read_dir(folder).await else { return true };
    while let Ok(Some(entry)) = entries.next_entry().await {
        if !entry.file_name().to_string_lossy().starts_with("..") {
            return false;
        }
    }
    true
}

fn certificates(key: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, SecretError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).collect();
    if found.is_empty() { Err(SecretError::NoCertificate(key.to_owned())) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, SecretFolder) {
        let folder = tempfile::tempdir().unwrap();
        for (key, text) in files {
            std::fs::write(folder.path().join(key), text).unwrap();
        }
        let secret = SecretFolder::new(Some(folder.path().to_owned()));
        (folder, secret)
    }

    #[tokio::test]
    async fn a_login_is_a_pair_and_a_line_break_is_no_part_of_it() {
        let (_folder, secret) = folder(&[(USERNAME, "relay\n"), (PASSWORD, " secret \r\n")]);
        assert_eq!(secret.login().await.unwrap(), Some(("relay".to_owned(), " secret ".to_owned())));
        assert_eq!(SecretFolder::default().login().await.unwrap(), None);
        let (_folder, half) = folder(&[(PASSWORD, "secret")]);
        let error = half.login().await.unwrap_err().to_string();
        assert_eq!(error, "the Secret has password without username: give both, or neither");
    }

    #[tokio::test]
    async fn a_secret_that_is_missing_is_said_instead_of_logging_in_as_nobody() {
        let (folder, secret) = folder(&[]);
        std::fs::create_dir(folder.path().join("..data")).unwrap();
        assert_eq!(secret.login().await.unwrap_err().to_string(), "the Secret does not exist, or has no keys");
        let gone = SecretFolder::new(Some(folder.path().join("another")));
        assert!(matches!(gone.tls().await, Err(SecretError::Empty)));
    }

    #[tokio::test]
    async fn what_is_no_certificate_is_named_and_not_quoted() {
        let (_folder, secret) = folder(&[(CA, "secret")]);
        let error = secret.tls().await.unwrap_err().to_string();
        assert_eq!(error, "ca.crt of the Secret has no certificate in PEM form");
        let (_folder, half) = folder(&[(CERTIFICATE, "secret")]);
        let error = half.tls().await.unwrap_err().to_string();
        assert_eq!(error, "the Secret has tls.crt without tls.key: give both, or neither");
        assert!(SecretFolder::default().tls().await.is_ok());
    }
}
