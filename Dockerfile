# Two images of one build: `--target weft` (the operator and the data plane), `--target weft-examples`.
# hack/image makes the same without Docker.

FROM docker.io/library/rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --workspace --bins \
    && mkdir -p /out/weft /out/examples \
    && find target/release -maxdepth 1 -type f -executable -name weft -exec cp {} /out/weft/ \; \
    && find target/release -maxdepth 1 -type f -executable ! -name weft -exec cp {} /out/examples/ \;

# of the same Debian as the build: it has the C library and the OpenSSL that the programs are linked with
FROM gcr.io/distroless/cc-debian12:nonroot AS base
USER 65532:65532
ENV PATH=/usr/bin
WORKDIR /home/nonroot
LABEL org.opencontainers.image.licenses=Apache-2.0

FROM base AS weft-examples
COPY --from=build /out/examples/ /usr/bin/
ENTRYPOINT ["/usr/bin/customers-and-orders"]

FROM base AS weft
COPY --from=build /out/weft/weft /usr/bin/weft
ENTRYPOINT ["/usr/bin/weft"]
