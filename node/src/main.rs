//! `weft`: the agent of one server and the command line of the cluster.

mod args;
mod config;

fn main() {}
