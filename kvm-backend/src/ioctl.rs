//! The one shape of ioctl that rustix has no pattern for: its return value counts or names something.

use std::ffi::c_void;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

/// An ioctl whose argument is a number or a pointer and whose return value is the answer.
pub(crate) struct Answering<const OPCODE: Opcode> {
    argument: *mut c_void,
}

impl<const OPCODE: Opcode> Answering<OPCODE> {
    /// # Safety
    ///
    /// `OPCODE` must be a valid ioctl for the descriptor that it will be used on, and
    /// `argument` what it expects: a number, or a pointer to what it reads and writes that
    /// stays valid, and is not otherwise borrowed, until the call returns.
    pub(crate) unsafe fn new(argument: *mut c_void) -> Self {
        Self { argument }
    }
}

// SAFETY: the creator vouched for opcode and argument; the output is the plain return value.
unsafe impl<const OPCODE: Opcode> Ioctl for Answering<OPCODE> {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<IoctlOutput> {
        Ok(output)
    }
}
