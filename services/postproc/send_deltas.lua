-- Send one message to each gateway. A gateway that is gone has no stream, and gets none.
-- KEYS: shards, deltas...
-- ARGV: fence, length of a stream, v, m...
-- requires: fence
-- requires: deliver
for i = 2, #KEYS do
  deliver(KEYS[i], ARGV[at], ARGV[at + 1], ARGV[at + i])
end
