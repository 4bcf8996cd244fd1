//! `memlaned`: the daemon's command line.

use std::process::ExitCode;

use clap::Parser;
use memlane_kvm::descriptors;
use memlaned::arguments::Arguments;
use memlaned::config::Config;
use memlaned::log;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("MEMLANE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let written = log::begin(filter);
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
                i32::from(error.exit_code())
            }
        };
        drop(written);
        // To end the runtime would wait for every helper thread, no matter how long that takes.
        std::process::exit(code)
    })
}
