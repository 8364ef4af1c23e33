-- List the newest entries of a quarantine stream, without their messages.
-- KEYS: quarantine
-- ARGV: max entries, request id or "" for those of all requests
-- Returns {{entry, request id, reason, attempts}, the newest first}; "" is a field that an entry lacks.
-- requires: typed
local found, most, next_id = {}, tonumber(ARGV[1]), '+'
while #found < most and is_a('stream', KEYS[1]) do
  -- A page at a time: an entry has the whole prompt.
  local page = redis.call('XREVRANGE', KEYS[1], next_id, '-', 'COUNT', math.min(most, 20))
  if #page == 0 then break end
  for _, entry in ipairs(page) do
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    local id = fields.r or ''
    if #found < most and (ARGV[2] == '' or id == ARGV[2]) then
      found[#found + 1] = {entry[1], id, fields.reason or '', fields.attempts or ''}
    end
    next_id = '(' .. entry[1]
  end
end
return found
