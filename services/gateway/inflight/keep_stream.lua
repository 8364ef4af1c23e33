-- Keep a gateway's stream of deltas alive and trim it below the entry last read; create it if it is gone. Postproc and
-- mm_encoder write to the stream only while it exists, so a gateway that is gone leaves nothing behind.
-- KEYS: stream
-- ARGV: expiry in s, v, m, id of the last entry read
-- Returns 1 if the stream was created.
-- requires: typed
local gone = not is_a('stream', KEYS[1])
if gone then
  redis.call('UNLINK', KEYS[1])
  redis.call('XADD', KEYS[1], '*', 'v', ARGV[2], 'm', ARGV[3])
end
redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return gone and 1 or 0
