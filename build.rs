//! Compiles `proto/csi.proto` without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/csi.proto");
    let files = protox::compile(["proto/csi.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Only tests are clients, and they bring their own channel.
        .build_transport(false)
        // Ordered, so that the same request always has the same encoding: retries are known by it.
        .btree_map(".")
        .compile_fds(files)?;
    Ok(())
}
