//! Converts the engine's types into the API's types.

use memlane_api::types;
use memlane_guest::{Guest, qemu};
use memlane_migrate::{Progress, preflight, progress};
use memlane_protocol::wire::attach::RunState;

/// Converts the progress of a migration.
pub(crate) fn migration(progress: &Progress) -> types::Migration {
    // Without `..`, so that nothing new is forgotten here.
    let Progress {
        id,
        guest,
        host,
        role,
        started_at_unix_seconds,
        total_seconds,
        retries_left,
        retry_of,
        status,
        ram,
        pause,
        lanes,
        stun,
        postcopy,
    } = progress.clone();
    let progress::MigrationStatus {
        phase,
        outcome: ended,
        reason,
        guest_runs_at,
        in_doubt_since_unix_seconds,
        waits_for,
        decision,
    } = status;
    let progress::RamStats {
        tracking_start_seconds,
        pages_total,
        pages_remaining,
        bytes_sent,
        uncompressed_bytes,
        compressed_bytes,
        pages_sent,
        zero_pages,
        hole_pages,
        longest_io_stall_seconds,
        bandwidth_bytes_per_second,
        iterations,
    } = ram;
    let progress::PauseStats {
        downtime_limit_seconds,
        downtime_predicted_seconds,
        forecast,
        downtime_seconds,
        stopped_at_seconds,
        resumed_at_seconds,
        digest_verified,
        vmm_state_bytes,
        save_seconds,
        load_seconds,
        guest_stays,
    } = pause;
    let in_danger = phase == progress::Phase::Fetching && ended.is_none();
    let lost_if = in_danger.then(|| what_loses_the_guest(&host));
    types::Migration {
        id,
        guest,
        host,
        role: role_of(role),
        phase: phase_of(phase),
        outcome: ended.map(outcome),
        reason,
        guest_runs_at,
        in_doubt_since_unix_seconds,
        waits_for,
        decision,
        retries_left,
        retry_of,
        started_at_unix_seconds,
        total_seconds,
        downtime_limit_seconds,
        downtime_seconds,
        stopped_at_seconds,
        resumed_at_seconds,
        downtime_predicted_seconds,
        forecast: forecast.map(forecast_of),
        digest_verified,
        pages_total,
        pages_remaining,
        bytes_sent,
        uncompressed_bytes,
        compressed_bytes,
        pages_sent,
        zero_pages,
        hole_pages,
        longest_io_stall_seconds,
        bandwidth_bytes_per_second,
        rounds: iterations.into_iter().map(round).collect(),
        lanes: lanes.into_iter().map(lane).collect(),
        stun: stun.map(stun_of),
        postcopy: postcopy.map(|postcopy| postcopy_of(postcopy, lost_if)),
        tracking_start_seconds,
        vmm_state_bytes,
        save_seconds,
        load_seconds,
        guest_stays,
    }
}

/// Converts the outcome of a migration.
pub(crate) fn outcome(outcome: progress::Outcome) -> types::Outcome {
    match outcome {
        progress::Outcome::Completed => types::Outcome::Completed,
        progress::Outcome::Failed => types::Outcome::Failed,
        progress::Outcome::Cancelled => types::Outcome::Cancelled,
        progress::Outcome::Refused => types::Outcome::Refused,
        progress::Outcome::Lost => types::Outcome::Lost,
        progress::Outcome::PoweredOff => types::Outcome::PoweredOff,
    }
}

/// Converts the findings of a preflight.
pub(crate) fn check(guest: String, host: String, findings: preflight::Findings) -> types::CheckReport {
    let ok = !findings.refused();
    let preflight::Findings { findings, ports, estimate } = findings;
    let preflight::Estimate { ram_bytes, data_bytes, state_bytes, bytes_per_second, seconds } = estimate;
    types::CheckReport {
        ok,
        guest,
        host,
        findings: findings.into_iter().map(finding).collect(),
        ports: ports.into_iter().map(port_check).collect(),
        estimate: types::Estimate { ram_bytes, data_bytes, state_bytes, bytes_per_second, seconds },
    }
}

/// Describes a guest, and the monitor of its QEMU if it runs in QEMU.
pub(crate) fn guest(guest: &Guest, supervisor: &qemu::Supervisor) -> types::GuestInfo {
    let standing = match guest.run_state.get() {
        RunState::Running if guest.lost.get() => types::Standing::Lost,
        RunState::Running if guest.is_moving() => types::Standing::Migrating,
        RunState::Running => types::Standing::Running,
        RunState::Incoming => types::Standing::Incoming,
        RunState::Relinquished => types::Standing::Relinquished,
        RunState::Loaded => types::Standing::Loaded,
    };
    let mac = |mac: &[u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let nics = guest.shape.nics.iter();
    let qemu = guest.driver.qemu();
    let monitor = qemu.and_then(|_| supervisor.monitor(&guest.shape.name));
    types::GuestInfo {
        name: guest.shape.name.to_string(),
        vmm: guest.shape.machine.vmm.to_string(),
        machine: qemu.map(|qemu| qemu.machine.clone()),
        vcpus: guest.shape.machine.vcpus,
        ram_bytes: guest.shape.ram_bytes(),
        tracker: guest.shape.tracker.name().to_owned(),
        standing,
        nics: nics
            .map(|nic| types::NicInfo { mac: mac(&nic.mac), network: nic.network.to_string() })
            .collect(),
        pid: Some(guest.process.identity().pid),
        qmp: monitor.map(|monitor| monitor.display().to_string()),
    }
}

fn role_of(role: progress::Role) -> types::Role {
    match role {
        progress::Role::Source => types::Role::Source,
        progress::Role::Destination => types::Role::Destination,
    }
}

/// Converts the step that a migration is at.
pub(crate) fn phase_of(phase: progress::Phase) -> types::Phase {
    match phase {
        progress::Phase::Preflight => types::Phase::Preflight,
        progress::Phase::Preparing => types::Phase::Preparing,
        progress::Phase::Copying => types::Phase::Copying,
        progress::Phase::SwitchingOver => types::Phase::SwitchingOver,
        progress::Phase::Committing => types::Phase::Committing,
        progress::Phase::Fetching => types::Phase::Fetching,
        progress::Phase::Ended => types::Phase::Ended,
    }
}

fn forecast_of(forecast: progress::Forecast) -> types::Forecast {
    let progress::Forecast {
        remaining_seconds,
        round_trip_seconds,
        state_seconds,
        resume_seconds,
        verify_seconds,
        margin_seconds,
    } = forecast;
    types::Forecast {
        remaining_seconds,
        round_trip_seconds,
        state_seconds,
        resume_seconds,
        verify_seconds,
        margin_seconds,
    }
}

fn round(iteration: progress::Iteration) -> types::Round {
    let progress::Iteration { number: round, pages, bytes, seconds, dirtied_pages, harvest_seconds } =
        iteration;
    types::Round { round, pages, bytes, seconds, dirtied_pages, harvest_seconds }
}

fn lane(lane: progress::Lane) -> types::Lane {
    let progress::Lane {
        port,
        lane,
        local,
        remote,
        bytes,
        zero_copy_bytes,
        copied_bytes,
        bytes_per_second,
        state,
        losses,
    } = lane;
    let state = match state {
        progress::LaneState::Connecting => types::LaneState::Connecting,
        progress::LaneState::Up => types::LaneState::Up,
        progress::LaneState::Lost => types::LaneState::Lost,
        progress::LaneState::Closed => types::LaneState::Closed,
    };
    types::Lane {
        port,
        lane,
        local,
        remote,
        bytes,
        zero_copy_bytes,
        copied_bytes,
        bytes_per_second,
        state,
        losses,
    }
}

fn stun_of(stun: progress::Stun) -> types::Stun {
    let progress::Stun { seconds, released_pages_per_second, target_pages_per_second, switch_seconds } = stun;
    types::Stun { seconds, released_pages_per_second, target_pages_per_second, switch_seconds }
}

/// Says what else than the network and the daemons must last until a guest that runs at `destination` is whole.
fn what_loses_the_guest(destination: &str) -> String {
    format!(
        "its VMM at {destination} ends, or {destination} or the host that it left goes down; at the host that it left, its VMM \
         and the daemon may end one at a time, but not both"
    )
}

fn postcopy_of(postcopy: progress::Postcopy, lost_if: Option<String>) -> types::Postcopy {
    let progress::Postcopy {
        faults,
        fault_p50_us,
        fault_p99_us,
        fault_max_us,
        pages_fetched,
        pages_streamed,
        remaining_pages,
        seconds,
        waits_for,
    } = postcopy;
    types::Postcopy {
        faults,
        fault_p50_us,
        fault_p99_us,
        fault_max_us,
        pages_fetched,
        pages_streamed,
        remaining_pages,
        seconds,
        waits_for,
        lost_if,
    }
}

fn finding(finding: preflight::Finding) -> types::Finding {
    let preflight::Finding { severity, what, detail, remedy } = finding;
    let severity = match severity {
        preflight::Severity::Ok => types::Severity::Ok,
        preflight::Severity::Warning => types::Severity::Warning,
        preflight::Severity::Refused => types::Severity::Refused,
    };
    types::Finding { severity, what, detail, remedy }
}

fn port_check(check: preflight::PortCheck) -> types::PortCheck {
    let preflight::PortCheck { port, peer_port, reachable, round_trip_seconds } = check;
    types::PortCheck { port, peer_port, reachable, round_trip_seconds }
}
