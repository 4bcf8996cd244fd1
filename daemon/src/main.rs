//! `memlaned`: the daemon's command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use memlane_kvm::descriptors;
use memlaned::config::Config;
use memlaned::log;
use tracing_subscriber::EnvFilter;

/// Moves running KVM guests between hosts.
///
/// One daemon runs on each host. VMMs attach their guests to it over a Unix socket; operators
/// talk to it with memlanectl.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration; systemd/memlaned.toml of the sources explains every key.
    #[arg(long, value_name = "FILE", default_value = "/etc/memlane/memlaned.toml")]
    config: PathBuf,
    /// Only read the configuration, and say what is wrong with it.
    #[arg(long)]
    check_config: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("MEMLANE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Under systemd, the journal adds the time.
    let (writer, written) = log::to_stderr();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init()
    } else {
        log.init()
    }
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("memlaned: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.check_config {
        if let Err(error) = config.credentials() {
            eprintln!("memlaned: {error}");
            return ExitCode::from(2);
        }
        println!("{} is fine", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = descriptors::make_room() {
        eprintln!("memlaned: cannot make room for file descriptors: {error}");
        return ExitCode::FAILURE;
    }
    tokio_uring::start(async {
        let code = match memlaned::daemon::run(config).await {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("memlaned: {error}");
                1
            }
        };
        drop(written);
        // To end the runtime would wait for every helper thread, no matter how long that takes.
        std::process::exit(code)
    })
}
