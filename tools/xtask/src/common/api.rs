//! Requests to a daemon that may be stopped or hang. Such a daemon is given up.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The longest wait for each part of an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns what a daemon's API has at `path`.
///
/// # Errors
///
/// If it does not answer, or not in JSON.
pub(crate) fn get(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).context("no daemon listens")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: memlaned\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the daemon does not answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the daemon's answer has no end")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "the daemon answers {head}");
    serde_json::from_str(body).context("the daemon's answer is no JSON")
}
