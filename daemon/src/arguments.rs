//! The daemon's command line.

use std::path::PathBuf;

use clap::Parser;

/// Moves running KVM guests between hosts.
///
/// One daemon runs on each host. VMMs attach their guests to it over a Unix socket; operators
/// talk to it with memlanectl.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    /// The configuration; the example beside the manual, memlaned.toml, explains every key
    #[arg(long, value_name = "FILE", default_value = "/etc/memlane/memlaned.toml")]
    pub config: PathBuf,
    /// Only read the configuration, and say what is wrong with it
    #[arg(long)]
    pub check_config: bool,
}
