-- Keep a gateway's stream of answers alive, trimmed below what was read. Others write to the stream only while it is there,
-- so nothing is left of a gateway that is not.
-- KEYS: stream
-- ARGV: expiry in s, v, m, id of the last entry read
-- Returns 1 if the stream was not there.
local gone = redis.call('EXISTS', KEYS[1]) == 0
if gone then redis.call('XADD', KEYS[1], '*', 'v', ARGV[2], 'm', ARGV[3]) end
redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return gone and 1 or 0
