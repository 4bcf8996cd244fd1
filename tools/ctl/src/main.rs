//! `memlanectl`: gives orders to the daemon of this host and shows what it does.

#![forbid(unsafe_code)]

use std::process::ExitCode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    memlanectl::run().await
}
