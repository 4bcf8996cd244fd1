//! The bodies of requests: they are read within bounds of size and time, and checked.

use std::time::Duration;

use crate::retry;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body;
use memlane_api::types::{ApiError, Attach, Converge, ErrorCode, Launch, Order, Resolution, Resolve};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::MAX_DEFINITION_BYTES;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

/// The body of a request may have at most this many bytes, unless it brings a guest file.
pub(super) const MAX_BODY_BYTES: usize = 64 << 10;
/// A body that brings a guest file may have at most this many bytes. JSON may write each byte of the file as `\u001f`.
pub(super) const MAX_LAUNCH_BYTES: usize = MAX_BODY_BYTES + 6 * MAX_DEFINITION_BYTES;
/// A request must arrive within this time.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A type that the body of a request may have.
pub trait Content: DeserializeOwned {
    /// The body may have at most this many bytes.
    const MAX_BYTES: usize = MAX_BODY_BYTES;

    /// Describes a value that is out of range and the values that are allowed; `None` if all values are allowed.
    fn complaint(&self) -> Option<String>;
}

impl Content for Order {
    fn complaint(&self) -> Option<String> {
        match self {
            Order { downtime_limit_seconds: Some(limit), .. } if !(0.001..=60.0).contains(limit) => {
                Some(format!("downtime_limit_seconds = {limit} is not allowed; give it 0.001 to 60"))
            }
            Order { max_rounds: Some(rounds), .. } if !(1..=1000).contains(rounds) => {
                Some(format!("max_rounds = {rounds} is not allowed; give it 1 to 1000"))
            }
            Order { max_stun_percent: Some(percent @ 100..), .. } => {
                Some(format!("max_stun_percent = {percent} is not allowed; give it 0 to 99"))
            }
            Order { patience_seconds: Some(patience), .. } if !(0.0..=600.0).contains(patience) => {
                Some(format!("patience_seconds = {patience} is not allowed; give it 0 to 600"))
            }
            Order { retry: Some(retry), .. } if *retry > retry::MOST => {
                Some(format!("retry = {retry} is not allowed; give it 0 to {}", retry::MOST))
            }
            // Memory of a guest that runs cannot be compared.
            Order { verify: true, postcopy, converge, .. }
                if postcopy.is_some() || matches!(converge, Some(Converge::Postcopy | Converge::Auto)) =>
            {
                let why = "digests can only be compared while the guest is paused with all of its memory at one host";
                Some(format!("verify together with post-copy is not allowed; give it one of them ({why})"))
            }
            _ => None,
        }
    }
}

impl Content for Resolve {
    fn complaint(&self) -> Option<String> {
        let unpromised = self.action == Resolution::RunHere && !self.other_host_is_off;
        unpromised.then(|| {
            "run_here without other_host_is_off is not allowed; give it only if the other host is off, or its \
             VMM of this guest"
                .to_owned()
        })
    }
}

impl Content for Launch {
    const MAX_BYTES: usize = MAX_LAUNCH_BYTES;

    /// Accepts every definition here: it is checked when the guest is started.
    fn complaint(&self) -> Option<String> {
        None
    }
}

impl Content for Attach {
    fn complaint(&self) -> Option<String> {
        let Attach { name, qmp, .. } = self;
        if let Err(error) = name.parse::<Label>() {
            return Some(format!("name is not allowed: {error}"));
        }
        // sun_path, less the NUL at its end: unix(7).
        let fits = qmp.starts_with('/') && qmp.len() < 108 && !qmp.contains('\0');
        let found: String = qmp.chars().take(120).collect();
        let allowed = "a path that begins with /, of at most 107 bytes";
        (!fits).then(|| format!("qmp = {found:?} is not allowed; give it {allowed}"))
    }
}

/// Reads the body of a request.
///
/// # Errors
///
/// Fails if the body is too large, too slow, not understood, or has a value that is not allowed.
pub(super) async fn read<T, B>(body: B) -> Result<T, ApiError>
where
    T: Content,
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let slow = |_| ApiError::new(ErrorCode::Slow, "the body of the request did not arrive in time");
    let whole = Limited::new(body, T::MAX_BYTES).collect();
    let bytes = match timeout(REQUEST_TIMEOUT, whole).await.map_err(slow)? {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body of this request may have {} bytes at most", T::MAX_BYTES);
            return Err(ApiError::new(ErrorCode::TooLarge, message));
        }
        Err(error) => {
            let message = format!("cannot read the body of the request: {error}");
            return Err(ApiError::new(ErrorCode::Invalid, message));
        }
    };
    parse(&bytes)
}

/// Understands the bytes of a body.
///
/// # Errors
///
/// Fails with [`ErrorCode::Invalid`] if they are not understood, or have a value that is not allowed.
pub fn parse<T: Content>(bytes: &[u8]) -> Result<T, ApiError> {
    let invalid = |message: String| ApiError::new(ErrorCode::Invalid, message);
    let content: T = serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("the body of the request is not understood: {error}")))?;
    match content.complaint() {
        None => Ok(content),
        Some(complaint) => Err(invalid(complaint)),
    }
}
