//! The output of `memlanectl`, for programs.

use anyhow::{Context, Result};
use serde_json::Value;

/// The output of a run of `memlanectl`.
#[derive(Debug)]
pub struct CtlOutput {
    /// The exit code.
    pub code: i32,
    /// The lines of JSON on stdout.
    pub json: Vec<Value>,
    /// Everything that it printed on stdout and stderr, for messages.
    pub text: String,
}

impl CtlOutput {
    /// Returns the last line of JSON.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn last(&self) -> Result<&Value> {
        self.json.last().with_context(|| format!("memlanectl printed no JSON: {}", self.text))
    }
}
