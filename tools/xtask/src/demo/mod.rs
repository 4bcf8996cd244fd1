//! `cargo xtask demo`: a guest moves between two hosts while it writes.

mod converge;
mod format;
mod linked;
mod linux;
mod options;
mod own_systems;
mod report;

use anyhow::{Context, Result, bail};
use memlane_lab::{LabOptions, Programs, Requirement, Rig, RigOptions, cleanup_on_signal, qemu, why_not};

use options::{GuestChoice, HostsChoice};

pub(crate) use options::DemoOptions;

/// The least bandwidth of an order. It is low because the demo may be told to use slow ports.
const MIN_BANDWIDTH: &str = "1mbit";
/// Runs the demo; returns true if all went well.
pub(crate) fn run(options: &DemoOptions) -> Result<bool> {
    let qemu = options.guest == GuestChoice::Qemu;
    if options.hosts != HostsChoice::Namespaces {
        let demo = options.move_between_systems()?;
        println!("{}", if options.json { demo.json().to_string() } else { demo.text() });
        return Ok(demo.is_good());
    }
    if let Some(which) = &options.qemu {
        qemu::prefer(which.clone());
    }
    if qemu && why_not(&[Requirement::Root]).is_none() {
        qemu::obtain()?;
    }
    let more = match options.guest {
        GuestChoice::Kvm => &[Requirement::Kvm][..],
        GuestChoice::Process => &[],
        GuestChoice::Qemu => &[Requirement::Qemu],
    };
    if let Some(missing) = why_not(&[Requirement::LAB, more].concat()) {
        let remedy = if missing.contains("/dev/kvm") { "; without KVM, try --guest process" } else { "" };
        bail!(
            "the demo makes network namespaces and needs root: sudo env PATH=\"$PATH\" cargo xtask demo ({missing}){remedy}"
        );
    }
    cleanup_on_signal().context("preparing to clean up")?;
    options.say("building the programs");
    let programs = Programs::build(true)?;
    let lab = LabOptions {
        ports: options.ports,
        port_rate: options.port_rate,
        bridge: true,
        switch: qemu,
        ..LabOptions::default()
    };
    let tables = format!("[limits]\nmin_bandwidth = \"{MIN_BANDWIDTH}\"\n");
    let insecure = options.insecure;
    let mut rig = Rig::new(
        &programs,
        RigOptions { lab, tables, may_start_guests: qemu, insecure, ..RigOptions::default() },
    )?;
    let traffic = if insecure { "nothing encrypted" } else { "all traffic encrypted (TLS 1.3)" };
    options.say(&format!("two hosts, {} each, {traffic}; starting the guest", count(options.ports, "port")));
    let demo = if qemu { options.move_linux_guest(&mut rig) } else { options.move_linked_guest(&mut rig) }?;
    if options.json {
        println!("{}", demo.json());
    } else {
        println!("{}", demo.text());
    }
    Ok(demo.is_good())
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
