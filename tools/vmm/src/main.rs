//! `memlane-vmm`: runs one guest, and attaches it to a Memlane daemon.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use memlane_kvm::attach::{self, Ended, Vmm};
use memlane_protocol::wire::attach::RunState;
use memlane_vmm::control;
use memlane_vmm::flags::Flags;
use memlane_vmm::history::HistoryFile;
use memlane_vmm::vmm::GuestVmm;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memlane-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let (control, history) = (flags.control.clone(), flags.history.clone());
    let config = flags.config()?;
    let (incoming, socket) = (config.incoming, config.attach.clone());
    let mut vmm = GuestVmm::new(config).map_err(anyhow::Error::msg)?;
    if let Some(path) = history {
        let failed = || format!("cannot make the history {}", path.display());
        vmm.keep_history(HistoryFile::open(&path).with_context(failed)?);
    }
    let observer = Arc::new(vmm.observer());
    let vmm = Arc::new(Mutex::new(vmm));
    let (quit, quits) = channel();
    if let Some(path) = &control {
        control::serve(path, Arc::clone(&vmm), Arc::clone(&observer), quit.clone())
            .with_context(|| format!("cannot make the control socket {}", path.display()))?;
    }
    let ended = (|| {
        if !incoming {
            start(&vmm)?;
        }
        let attachment = socket.map(|socket| {
            let run_state = if incoming { RunState::Incoming } else { RunState::Running };
            attach::serve(attach::Options { socket, run_state, refusal_is_final: false }, vmm)
        });
        let mut attachment = attachment.transpose().context("cannot attach")?;
        loop {
            match quits.recv_timeout(Duration::ZERO) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if let Some(failure) = observer.failure(Duration::from_millis(50)) {
                bail!("{failure}");
            }
            if attachment.as_ref().is_some_and(attach::Attachment::is_finished)
                && let Some(ended) = attachment.take().map(attach::Attachment::wait)
            {
                match ended {
                    Ended::Discarded => tracing::info!("the guest runs elsewhere"),
                    Ended::Stopped => {}
                    Ended::Refused(reason) => bail!("the daemon refused this VMM: {reason}"),
                }
                return Ok(());
            }
        }
    })();
    if let Some(path) = control {
        // It may have been removed by whoever asked for it.
        let _ = std::fs::remove_file(path);
    }
    ended
}

fn start(vmm: &Mutex<GuestVmm>) -> anyhow::Result<()> {
    let mut vmm = vmm.lock().expect("no other thread has had the lock yet");
    vmm.resume().map_err(|error| anyhow::anyhow!("cannot start the guest: {error}"))?;
    tracing::info!(name = %vmm.shape().name, "the guest runs");
    Ok(())
}
