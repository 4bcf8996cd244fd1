//! Hosts made of network namespaces, for the demo, the end-to-end tests and the benchmarks.
//!
//! A [`Lab`] is two [`LabHost`]s joined by veth pairs: one for control traffic, and as many ports as are asked for,
//! each held to a rate if one is given. Ports with a delay, or that lose packets, are joined by a thread of this
//! process instead, between two tun interfaces. Programs run inside a host with [`LabHost::command`] and [`LabHost::spawn`];
//! sockets are opened inside it with [`LabHost::run_in`].
//!
//! A lab can also be made of two [`RemoteHosts`] that are there already and are reached over ssh: there is an [`agent`] of ours
//! on each then, and what only a host can have that was made here is refused.
//!
//! [`vm::Hosts`] are two hosts with kernels and disks of their own, made of [trees of Debian](debian::Tree).
//!
//! Nothing is left behind: namespaces, programs and directories go when the guards are dropped, on SIGINT and
//! SIGTERM once [`cleanup_on_signal`] was called, and otherwise when the next lab is made.

pub mod agent;
mod background;
mod cable;
mod cache;
mod capture;
mod child;
mod cleanup;
mod client;
mod clock;
mod counters;
pub mod debian;
mod history;
mod host;
mod hosts;
mod huge_pages;
pub mod installed;
mod lab;
mod lan;
mod late_disk;
pub mod linux;
mod namespace;
mod network;
mod package;
mod process;
mod programs;
pub mod qemu;
pub mod qmp;
mod rate;
mod readers;
mod remote;
mod requirements;
mod rig;
mod size;
pub mod systemd;
mod tun;
mod user;
pub mod vm;
mod vmm;
mod wait;

pub use background::BackgroundProcess;
pub use cable::Loss;
pub use capture::{Capture, EthernetFrame};
pub use cleanup::{cleanup_on_signal, flag_on_signal};
pub use client::{ClientSession, GuestCounters, tell_guest};
pub use clock::unix_time;
pub use counters::{Carried, InterfaceCounters};
pub use history::{GuestHistory, NotedState, Time, time_now};
pub use host::{HostId, LabHost, LabPort};
pub use hosts::RemoteHosts;
pub use huge_pages::HugePages;
pub use lab::{Lab, LabOptions, MAX_PORTS};
pub use lan::Lan;
pub use late_disk::LateDisk;
pub use network::Bridge;
pub use package::package;
pub use process::LabProcess;
pub use programs::Programs;
pub use rate::Rate;
pub use readers::Readers;
pub use remote::Remote;
pub use requirements::{MissingRequirement, OVMF, Requirement, SSHD, missing, say_skipped, skip, why_not};
pub use rig::{CtlOutput, Rig, RigOptions};
pub use size::Size;
pub use user::DaemonUser;
pub use vmm::{LabVmm, ProgressStream, VmmSession};
pub use wait::wait_for;
