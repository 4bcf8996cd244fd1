//! The package, the units and the first steps, on two hosts that systemd has started.

mod first_steps;
mod hosts;
mod install;
mod service;
mod upgrade;
