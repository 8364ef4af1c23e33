"""Schema of Redis: every key, stream and consumer group. No other module spells a key.

    key                              type    written by           read by            life
    {ns}:encode                      stream  gateway, engine      mm_encoder (group) entry deleted with its ack
    {ns}:generate                    stream  gateway, mm_encoder  engine (group)     entry deleted with its ack, at the request's end
    {ns}:tokens:{shard}              stream  engine, mm_encoder,  postproc, engine   trimmed below what the journals hold
                                             gateway
    {ns}:deltas:{gateway}            stream  postproc, mm_encoder that gateway       created and deleted by that gateway, which trims entries it has read
    {ns}:control                     stream  any                  every replica      trimmed by length
    {ns}:request:{id}                hash    gateway, engine      all                until `retain_s` after the answer's end; at once if
                                             it was cancelled or failed
                                             fields: request (msgpack Request), epoch (int), cancelled ("1"),
                                             begin (msgpack Begin), finish (msgpack Finish, at the end) by postproc,
                                             gateways (names, separated by spaces: receivers of its deltas) by gateway,
                                             encode (the Encode it came from, while it is in generate), made (digest of the Generate it
                                             became), ahead (id of the entry of encode under which its embeddings were made
                                             after that), failed (the Failure it is about to end with), returned (times it
                                             was sent back for encoding), reached (tokens at its last redelivery), over
                                             ("1", its last word is in tokens), all by shared/bus/ownership.py;
                                             entry (key of a work stream, id of its entry there, and its progress then)
                                             by who appends or claims it; shortened (ms that it is
                                             kept at most after its finish) by gateway;
                                             charged (tokens expected, and k) by the script that takes turns.
                                             A value of a later version of the messages than 1 begins with the byte c1
                                             and the version: also in logprobs
    {ns}:journal:{id}                string  postproc             engine, postproc   the same
                                             little-endian uint32 token ids; bytes [4i, 4i+4) are generated token i;
                                             a token that stopped the answer is in `finish` alone
    {ns}:logprobs:{id}               list    postproc             postproc           the same; only where the request asked for them
                                             msgpack TokenLogprob or nil; element i belongs to generated token i
    {ns}:idempotency:{digest}        string  gateway              gateway            until `retain_s` after the request's deadline;
                                             void once one of its requests has no record
                                             JSON {"body_hash": ..., "request_ids": [...]}
    {ns}:blob:{kind}:{key}           hash    gateway, mm_encoder  mm_encoder, engine TTL; evicted oldest first over the byte budget
                                             fields: size, chunks, meta
    {ns}:blob:{kind}:{key}:{n}       string  the same             the same           the same; chunk n, about 1 MB
    {ns}:blobs                       zset    the same             the same           index of blobs by last use, for eviction
    {ns}:blobs:sizes                 hash    the same             the same           bytes of each indexed blob, their sum, and that of the pinned ones
    {ns}:blobs:owned                 hash    the same             the same           "bytes:owner" of each blob that has an owner
    {ns}:blobs:owners                zset    the same             the same           owners by bytes
    {ns}:blobs:of:{owner}            zset    the same             the same           their blobs by last use
    {ns}:blobs:pinned                zset    the same             the same           blobs that are not evicted, by expiry: uploads of requests that live
    {ns}:responses:blob:{kind}:{id}  hash    gateway              gateway            `responses_keep_s` after the last use; evicted oldest
                                             first of who has most, over `responses_budget_bytes`; kinds: head, input, end; chunks and indexes
                                             as above, all below {ns}:responses
    {ns}:file:{id}                   hash    gateway              gateway            until it is deleted or its expiry
                                             fields: owner, size, chunks; about (JSON), once it is complete
    {ns}:file:{id}:{n}               string  gateway              gateway            the same; chunk n, about 1 MB
    {ns}:files                       zset    gateway              gateway            files by expiry, also those being written
    {ns}:files:sizes                 hash    gateway              gateway            bytes of each file, of each owner's, and of all
    {ns}:files:of:{owner}            zset    gateway              gateway            complete files of an API key, by creation
    {ns}:batches                     zset    gateway              gateway            batches that have not ended, by creation
    {ns}:batches:of:{owner}          zset    gateway              gateway            batches of an API key, by creation
    {ns}:batch:{id}                  hash    gateway              gateway            until `files_keep_s` after its end
                                             fields: about (JSON), status, total, completed, failed, expired (lines), tenant, owner,
                                             errors (JSON), and the times of its statuses
    {ns}:batch:{id}:done             string  gateway              gateway            until its end; bitmap of lines with a result
    {ns}:batch:{id}:lease            string  gateway              gateway            the gateway that works on it; expires unless renewed
    {ns}:flights                     hash    mm_encoder           mm_encoder         field deleted when its embeddings are stored
                                             encode locks: content key -> replica; void once its lease has expired
    {ns}:replicas:{service}          set     each replica         all                names that ever joined and have not left
    {ns}:replica:{service}:{name}    string  that replica         all                the lease: JSON status, expires unless renewed
                                             with the facts that all must agree on, and the versions it reads and writes
    {ns}:shards                      hash    postproc             postproc           shard -> "epoch owner", the fencing token; "count" -> number of shards
    {ns}:{stream}:turns              hash    mm_encoder, engine   mm_encoder, engine a day after its last use; what tenants have been served
                                             beside encode and generate, as the next two; made again from the stream
    {ns}:{stream}:turns:{class}      zset    the same             the same           while somebody waits: queues, by counter
    {ns}:{stream}:turn:{class} {name} list   the same             the same           the same: a tenant's entries that wait, in order
    {ns}:tenant:{name}               hash    gateway              gateway, CLI       kept; the name of an API key, or empty: all requests together
                                             requests, tokens, media (used of a minute's), queued (tokens), used:...
    {ns}:tenant:{name}:open          hash    gateway              gateway            field deleted at its request's end, or when its place is needed
                                             request id -> "tokens of its prompt while it waits:when it came in microseconds"
    {ns}:tenant:{name}:open:swept    string  gateway              gateway            a second, for which ended requests are not looked for again
    {ns}:tenant:{name}:open:uploads  hash    gateway              gateway            the same as the open request's field
                                             request id -> bytes of its uploads
    {ns}:tenants:left                hash    gateway              gateway            field deleted at its request's end; a day after
                                             the last request that was limited
                                             "name id" of open requests -> what is charged of its answer, the limit a minute, and
                                             the gateway that charges it at its end, unless its client has left
    {ns}:tenants:left:looked         string  gateway              gateway            the gateway that last charged what these have; 4.5 s
    {ns}:leader:{role}               string  autoscaler           autoscaler         name of the leader; expires unless renewed
    {ns}:quarantine:{stream}         stream  mm_encoder, engine   operators          dead letters: poison entries, kept for inspection

An entry has the fields v (version of the messages) and m (msgpack); of encode and generate also r, the request's id, and
k, its place in the order of service, if it has one. Consumer groups are named after the service and start at id 0.
Consumers are named after their replica; one that is called `newer` holds the entries that only replicas of a newer version
can read, and `waiting` those that wait for their turn among tenants.

Which user of Redis may touch which of them is in users.acl beside this module.
"""

import msgspec

ENCODE = "encode"
GENERATE = "generate"
NEWER = "newer"  # consumer of no replica: pending under it is what only replicas of a newer version can read
WAITING = "waiting"  # the same: what waits for its turn among tenants (shared/bus/scripts/turns.lua)
SERVICES = ("gateway", "mm_encoder", "engine", "postproc")  # in the order in which a request meets them


class Keys(msgspec.Struct, frozen=True):
    """Key names in one namespace, so that several deployments can share a Redis."""

    ns: str

    def stream(self, name: str) -> str:
        """Return the key of a work stream: `encode` or `generate`."""
        return f"{self.ns}:{name}"

    def tokens(self, shard: int) -> str:
        return f"{self.ns}:tokens:{shard}"

    def deltas(self, gateway: str) -> str:
        return f"{self.ns}:deltas:{gateway}"

    def control(self) -> str:
        return f"{self.ns}:control"

    def request(self, request_id: str) -> str:
        return f"{self.ns}:request:{request_id}"

    def idempotency(self, digest: str) -> str:
        """Return the key of a submission; `digest` covers the tenant and the client's Idempotency-Key."""
        return f"{self.ns}:idempotency:{digest}"

    def journal(self, request_id: str) -> str:
        return f"{self.ns}:journal:{request_id}"

    def logprobs(self, request_id: str) -> str:
        return f"{self.ns}:logprobs:{request_id}"

    def blob(self, kind: str, key: str) -> str:
        return self.blob_prefix() + self.blob_member(kind, key)

    def blob_prefix(self) -> str:
        """Return the prefix of `blob`, for scripts that take the members from the index."""
        return f"{self.ns}:blob:"

    def blob_member(self, kind: str, key: str) -> str:
        """Return the name of a blob in the index."""
        return f"{kind}:{key}"

    def blob_chunk(self, kind: str, key: str, n: int) -> str:
        return f"{self.blob(kind, key)}:{n}"

    def responses(self) -> "Keys":
        """Return the names of stored responses: blobs in a namespace, and a budget, of their own."""
        return Keys(f"{self.ns}:responses")

    def file(self, file_id: str) -> str:
        return f"{self.ns}:file:{file_id}"

    def file_chunk(self, file_id: str, n: int) -> str:
        return f"{self.file(file_id)}:{n}"

    def files(self) -> str:
        return f"{self.ns}:files"

    def file_sizes(self) -> str:
        return f"{self.ns}:files:sizes"

    def files_of(self, owner: str) -> str:
        return f"{self.files()}:of:{owner}"

    def batches(self) -> str:
        return f"{self.ns}:batches"

    def batches_of(self, owner: str) -> str:
        return f"{self.batches()}:of:{owner}"

    def batch(self, batch_id: str) -> str:
        return f"{self.ns}:batch:{batch_id}"

    def batch_done(self, batch_id: str) -> str:
        return f"{self.batch(batch_id)}:done"

    def batch_lease(self, batch_id: str) -> str:
        return f"{self.batch(batch_id)}:lease"

    def blobs(self) -> str:
        return f"{self.ns}:blobs"

    def blob_sizes(self) -> str:
        return f"{self.ns}:blobs:sizes"

    def blob_pins(self) -> str:
        return f"{self.ns}:blobs:pinned"

    def encode_locks(self) -> str:
        return f"{self.ns}:flights"

    def replicas(self, service: str) -> str:
        return f"{self.ns}:replicas:{service}"

    def replica(self, service: str, name: str) -> str:
        return f"{self.ns}:replica:{service}:{name}"

    def replica_prefix(self, service: str) -> str:
        """Return the prefix of `replica`, for scripts that append names."""
        return self.replica(service, "")

    def shards(self) -> str:
        return f"{self.ns}:shards"

    def turn(self, stream: str, priority: int, name: str) -> str:
        """Return the key of the entries of a tenant that wait for their turn."""
        return f"{self.stream(stream)}:turn:{priority} {name}"

    def tenant(self, name: str) -> str:
        """Return the key of what a tenant uses. A name has no colon."""
        return f"{self.ns}:tenant:{name}"

    def tenant_open(self, name: str) -> str:
        return f"{self.tenant(name)}:open"

    def tenants_left(self) -> str:
        """Return the key of the requests of tenants that are charged though no client is there at their end."""
        return f"{self.ns}:tenants:left"

    def tenants_looked(self) -> str:
        return f"{self.tenants_left()}:looked"

    def leader(self, role: str) -> str:
        """Return the key of a leader election: one replica acts, the others stand by."""
        return f"{self.ns}:leader:{role}"

    def quarantine(self, stream: str) -> str:
        return f"{self.ns}:quarantine:{stream}"

    def types(self) -> dict[str, str]:
        """Return the type of each key that is there once, for all, and not for a request, a replica or a tenant."""
        own, responses = self, self.responses()
        return {
            **{key: "stream" for name in (ENCODE, GENERATE) for key in (own.stream(name), own.quarantine(name))},
            **{f"{own.stream(name)}:turns": "hash" for name in (ENCODE, GENERATE)},
            own.control(): "stream",
            **{own.replicas(service): "set" for service in SERVICES},
            own.shards(): "hash",
            own.tenants_left(): "hash",
            own.encode_locks(): "hash",
            **own.blob_types(),
            **responses.blob_types(),
            own.files(): "zset",
            own.file_sizes(): "hash",
            own.batches(): "zset",
        }

    def blob_types(self) -> dict[str, str]:
        """Return those of them that are where the blobs are, which may be another Redis."""
        index = {self.blobs(): "zset", self.blob_pins(): "zset", self.blob_sizes(): "hash"}
        return {**index, f"{self.blobs()}:owned": "hash", f"{self.blobs()}:owners": "zset"}
