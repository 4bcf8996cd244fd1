//! The state of a machine, which its VMM loads at another host.

use memlane_kvm::state::MachineState;

/// Reads a state for a machine of a few vCPUs, whose number comes first.
pub fn state(bytes: &[u8]) {
    let Some((vcpus, bytes)) = bytes.split_first() else { return };
    let vcpus = u16::from(vcpus % 4);
    let Ok(state) = MachineState::decode(bytes, vcpus) else { return };
    assert_eq!(state.vcpus.len(), usize::from(vcpus));
    let encoded = state.encode();
    assert_eq!(encoded.len(), bytes.len(), "a state has no bytes without a meaning");
    assert_eq!(MachineState::decode(&encoded, vcpus).as_ref().ok(), Some(&state));
    assert!(MachineState::decode(&encoded, vcpus + 1).is_err(), "a vCPU without a state");
}
