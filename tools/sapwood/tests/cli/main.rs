//! The contract of the command line, tried from outside: what every command promises, and what
//! each does.

mod api;
mod attached;
mod bases;
mod boot;
mod contract;
mod control;
mod daemon;
mod device;
mod harness;
mod imports;
mod layer;
mod limits;
mod metrics;
mod online;
mod qcow2;
mod raw;
mod restart;
mod serve;
mod served;
mod store;
mod top;
