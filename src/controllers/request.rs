//! What a failed request means: one reason, from the API server's answer.

use std::{future::Future, time::Duration};

use kube::core::response::Status;

use crate::controllers::resources::{child::ChildRef, outcome::Failure, reason::Reason};

/// Longest that one request may take, the client's own repetitions (429, 503, 504) included.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(15);

/// Longest part of the API server's message that is passed on, in characters.
const MAX_MESSAGE: usize = 400;

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("the API server did not answer within {} s", REQUEST_DEADLINE.as_secs())]
    Deadline,
    #[error("writing an object as JSON")]
    Json(#[from] serde_json::Error),
}

/// A request with its deadline.
pub async fn within_deadline<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
    match tokio::time::timeout(REQUEST_DEADLINE, request).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(RequestError::Deadline),
    }
}

impl RequestError {
    /// The API server's HTTP status, if it answered.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Api(kube::Error::Api(status)) => Some(status.code),
            Self::Api(_) | Self::Deadline | Self::Json(_) => None,
        }
    }

    pub fn reason(&self) -> Reason {
        match self {
            Self::Api(kube::Error::Api(status)) => reason_of(status),
            Self::Api(_) | Self::Deadline => Reason::ApiUnavailable,
            Self::Json(_) => Reason::ChildRefused,
        }
    }

    /// The API server's own sentence, or ours.
    pub fn message(&self) -> String {
        let message = match self {
            Self::Api(kube::Error::Api(status)) => status.message.clone(),
            Self::Api(error) => format!("the API server cannot be reached: {}", root(error)),
            Self::Deadline | Self::Json(_) => self.to_string(),
        };
        message.chars().take(MAX_MESSAGE).collect()
    }

    /// For `child`, in a sentence.
    pub fn about(&self, doing: &str, child: &ChildRef) -> Failure {
        let reason = self.reason();
        let message = self.message();
        let message = match reason {
            Reason::ChildConflict => {
                format!("{child} exists and is not Weft's: delete it or give this resource another name ({message})")
            }
            Reason::Forbidden => format!(
                "the operator may not {doing} {child}: its roles do not fit its version; upgrade the chart ({message})"
            ),
            _ => format!("cannot {doing} {child}: {message}"),
        };
        Failure { child: child.clone(), reason, message }
    }
}

/// How the message of a server-side apply begins that answers 500 because the child is not of its kind's form.
const FORMLESS: [&str; 2] = ["failed to create typed patch object", "failed to convert new object"];

fn reason_of(status: &Status) -> Reason {
    let has_cause =
        |cause: &str| status.details.iter().flat_map(|details| &details.causes).any(|known| known.reason == cause);
    match status.code {
        403 if has_cause("NamespaceTerminating") || status.message.contains("being terminated") => {
            Reason::NamespaceTerminating
        }
        403 if status.message.contains("exceeded quota") => Reason::QuotaExceeded,
        401 => Reason::Unauthorized,
        // the message of a webhook, and that of a ValidatingAdmissionPolicy
        403 if ["denied the request", "denied request"].iter().any(|message| status.message.contains(message)) => {
            Reason::ChildRefused
        }
        403 => Reason::Forbidden,
        404 => Reason::NotFound,
        // of two writes at the same time: nobody else has the object
        409 if status.message.contains("the object has been modified") => Reason::ApiUnavailable,
        409 => Reason::ChildConflict,
        422 if status.message.contains("Only one reference can have Controller set to true") => Reason::ChildConflict,
        400 | 405 | 413 | 415 | 422 => Reason::ChildRefused,
        500 if FORMLESS.iter().any(|message| status.message.starts_with(message)) => Reason::ChildRefused,
        _ => Reason::ApiUnavailable,
    }
}

fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::resources::child::ChildKind;

    fn refused(code: u16, message: &str) -> RequestError {
        RequestError::Api(kube::Error::Api(Box::new(Status { code, ..Status::failure(message, "") })))
    }

    #[test]
    fn answers_of_the_api_server_have_a_reason() {
        let cases = [
            (
                403,
                "forbidden: unable to create new content in namespace shop because it is being terminated",
                Reason::NamespaceTerminating,
            ),
            (403, "services is forbidden: User cannot patch", Reason::Forbidden),
            (403, "admission webhook \"policy.example\" denied the request: no owner", Reason::ChildRefused),
            (
                403,
                "deployments.apps \"orders\" is forbidden: ValidatingAdmissionPolicy 'owners' with binding 'all' denied request: no owner",
                Reason::ChildRefused,
            ),
            (409, "Apply failed with 1 conflict", Reason::ChildConflict),
            (
                409,
                "Operation cannot be fulfilled on deployments.apps \"orders\": the object has been modified; please apply your changes to the latest version and try again",
                Reason::ApiUnavailable,
            ),
            (
                422,
                "metadata.ownerReferences: Invalid value: Only one reference can have Controller set to true",
                Reason::ChildConflict,
            ),
            (422, "spec.ports[0].port: Invalid value", Reason::ChildRefused),
            (
                500,
                "failed to convert new object (shop/orders; apps/v1, Kind=Deployment) to proper version: unable to convert unstructured object to apps/v1, Kind=Deployment: quantities must match the regular expression",
                Reason::ChildRefused,
            ),
            (
                500,
                "failed to create typed patch object (shop/orders; apps/v1, Kind=Deployment): duplicate entries for key",
                Reason::ChildRefused,
            ),
            (429, "too many requests", Reason::ApiUnavailable),
            (500, "etcdserver: request timed out", Reason::ApiUnavailable),
        ];
        for (code, message, reason) in cases {
            assert_eq!(refused(code, message).reason(), reason, "{code} {message}");
        }
    }

    #[test]
    fn a_failure_names_the_child_and_the_remedy() {
        let child = ChildRef::new(ChildKind::Service, "orders");
        let failure = refused(409, "conflict with \"helm\"").about("apply", &child);
        assert!(
            failure.message.starts_with("Service orders exists and is not Weft's: delete it"),
            "{}",
            failure.message
        );
    }
}
