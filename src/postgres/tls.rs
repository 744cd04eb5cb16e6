//! TLS to a server whose Secret asks for it, by libpq's `sslmode`.
//!
//! | `sslmode` | with `ca.crt` | without |
//! |---|---|---|
//! | none given | `verify-full` | `prefer` |
//! | `disable` | no TLS | no TLS |
//! | `prefer` | TLS if the server offers it, nothing verified | the same |
//! | `require` | TLS, the chain verified | TLS, nothing verified |
//! | `verify-ca` | TLS, the chain verified | the same, by the system's certificates |
//! | `verify-full` | TLS, the chain and the server's name verified | the same, by the system's certificates |
//!
//! Source: PostgreSQL's documentation, "SSL Support" of libpq. `allow` is `prefer` here: TLS is tried first.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio_postgres::config::SslMode;

use crate::secret::{CA, SecretError, SecretFolder};

/// Key of the mode.
pub const MODE: &str = "sslmode";

/// Whether a connection uses TLS, and how.
#[derive(Clone, Debug)]
pub struct Tls {
    pub mode: SslMode,
    pub config: Arc<ClientConfig>,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("sslmode of the database's Secret is none: give disable, prefer, require, verify-ca or verify-full")]
    Mode,
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// How much of a server's certificate is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verified {
    Nothing,
    Chain,
    ChainAndName,
}

impl Tls {
    /// To a server in the pod network.
    pub fn off() -> Result<Self, TlsError> {
        let config = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|_| SecretError::Mismatch)?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        Ok(Self { mode: SslMode::Disable, config: Arc::new(config) })
    }

    /// As the Secret says.
    pub async fn of_secret(secret: &SecretFolder) -> Result<Self, TlsError> {
        let has_ca = secret.path(CA).is_some();
        let (mode, verified) = match (secret.text(MODE).await?.as_deref(), has_ca) {
            (Some("disable"), _) => return Self::off(),
            (None, false) | (Some("prefer" | "allow"), _) => (SslMode::Prefer, Verified::Nothing),
            (Some("require"), false) => (SslMode::Require, Verified::Nothing),
            (Some("require"), true) | (Some("verify-ca"), _) => (SslMode::Require, Verified::Chain),
            (None, true) | (Some("verify-full"), _) => (SslMode::Require, Verified::ChainAndName),
            (Some(_), _) => return Err(TlsError::Mode),
        };
        let (mut config, verifier) = secret.tls_with_verifier().await?;
        match verified {
            Verified::ChainAndName => {}
            verified => config
                .dangerous()
                .set_certificate_verifier(Arc::new(Lenient { verifier, chain: verified == Verified::Chain })),
        }
        Ok(Self { mode, config: Arc::new(config) })
    }
}

/// Verifies less than rustls does by itself: never the server's name, and its chain if `chain` says so.
#[derive(Debug)]
struct Lenient {
    verifier: Arc<dyn ServerCertVerifier>,
    chain: bool,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.chain {
            return Ok(ServerCertVerified::assertion());
        }
        match self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // the chain is verified before the name
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
